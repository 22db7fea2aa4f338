"""Few-shot linear evaluation: frozen features, and ridge regression on k images a class, as big_vision evaluates.

python examples/few_shot.py --model=ViT-B_16.npz --dataset=folder --data_dir=photos; without a file a small model learns
to tell the digits 0 to 4, and is evaluated on 5 to 9, which it has never seen.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # vitfn need not be installed

import vitfn
from vitfn import data, rng, tree, weights
from vitfn.data import Files, Split
from vitfn.data.augment import normalise
from vitfn.data.batches import batch_indices, evaluation_batches
from vitfn.data.crops import resize
from vitfn.tree import Tree

STRENGTHS = 2.0 ** torch.arange(-10, 21, 2)  # of the L2 penalty
BIAS = 100.0  # a feature that all images have; so large that its weight is small, and hardly penalised


def ridge(x: Tensor, y: Tensor, strengths: Tensor) -> Tensor:
    """The W that minimises |x W - y|^2 + s |W|^2 for each s of strengths (S,): x (N, D), y (N, K) -> (S, D, K).

    From one singular value decomposition x = U diag(d) V^T: W = V diag(d / (d^2 + s)) U^T y (Hoerl and Kennard, 1970).
    """
    u, d, vt = torch.linalg.svd(x, full_matrices=False)
    return vt.T @ ((d / (d**2 + strengths[:, None]))[..., None] * (u.T @ y))


def few_shot(shots: Split, held: Split, test: Split) -> tuple[float, float]:
    """Accuracy on `test`, and the strength that is best on `held`, of features (N, D), as images, and labels (N,)."""
    mean, std = shots.images.mean(0), shots.images.std(0, correction=0).clamp(min=1e-5)
    x, y, z = (F.pad((split.images - mean) / std, (0, 1), value=BIAS) for split in (shots, held, test))  # (N, D + 1)
    classes = shots.labels.unique()  # (K,), each of which is regressed against the others, as 1 against -1
    w = ridge(x, torch.where(shots.labels[:, None] == classes, 1.0, -1.0).to(x), STRENGTHS.to(x))  # (S, D + 1, K)
    best = (classes[(y @ w).argmax(-1)] == held.labels).sum(-1).argmax()
    return (classes[(z @ w[best]).argmax(-1)] == test.labels).double().mean().item(), STRENGTHS[best].item()


def drawn(split: Split, start: int, stop: int, seed: int = 0) -> Split:
    """The images start to stop - 1 of each class, in an order that is a function of the seed."""
    order = rng.permutation(split.size, rng.stream(seed, "few_shot"))
    index = torch.cat([order[split.labels[order] == label][start:stop] for label in split.labels.unique()])
    return Split(*(each[index] for each in split))


@torch.no_grad()
def features(params: Tree, split: Split | Files, config: vitfn.ViTConfig) -> Split:
    """What the model without its head makes of the images, (N, D or R) float64, in their place."""
    headless, fit = dataclasses.replace(config, num_classes=0), partial(resize, size=config.image_hw)
    batches = evaluation_batches(split, fit, batch_size=32, device="cpu")  # the last one is filled up
    x = torch.cat([vitfn.apply(params, normalise(images, config), headless) for images, _ in batches])
    return Split(x[: split.size].double(), split.labels)


def trained(params: Tree, config: vitfn.ViTConfig, split: Split, steps: int) -> Tree:
    """The parameters after `steps` of AdamW, the given ones left alone."""
    optimizer = vitfn.adamw(vitfn.warmup_cosine(2e-3, steps, steps // 10), weight_decay=0.05)
    train_step = vitfn.make_train_step(config, optimizer, compile="off")
    state = vitfn.TrainState(0, tree.clone(params), optimizer.init(params))
    for step in range(steps):
        images, labels = (each[batch_indices(split.size, 32, 0, step)] for each in split)
        state, _ = train_step(state, (normalise(images, config), labels))
    return state.params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FILE", help="weights in any layout (default: a small model is trained)")
    parser.add_argument("--dataset", default="digits", help="with --model: digits, cifar10, cifar100 or folder")
    parser.add_argument("--data_dir", default="data", help="folder with the dataset's files")
    parser.add_argument("--steps", type=int, default=300, help="of the small model's training, of 32 images each")
    args = parser.parse_args()
    config = weights.describe(args.model).config if args.model else vitfn.get_config("ViT-Nano_8", num_classes=5)
    train, test, _ = data.load(args.dataset if args.model else "digits", args.data_dir, channels=config.channels)
    models = {"accuracy": vitfn.load(args.model)} if args.model else {}
    if not args.model:
        parts = (train, train.labels < 5), (train, train.labels >= 5), (test, test.labels >= 5)
        low, train, test = (Split(*(each[part] for each in split)) for split, part in parts)
        models = {"untrained": (start := vitfn.init(config)), "trained": trained(start, config, low, args.steps)}
    found = [[features(params, split, config) for split in (train, test)] for params in models.values()]
    print("shots " + "".join(f"{name:>12}{'L2':>12}" for name in models))
    for k in (1, 5, 10, 25):  # and 25 others of each class choose the strength
        rows = [few_shot(drawn(x, 0, k), drawn(x, 25, 50), y) for x, y in found]
        print(f"{k:<6}" + "".join(f"{accuracy:>12.1%}{strength:>12g}" for accuracy, strength in rows))


if __name__ == "__main__":
    main()
