"""Fine-tunes a model on the digits by LoRA (arXiv 2106.09685): what is trained and stored is a small part of it.

python examples/lora.py --model=ViT-B_16.npz --out=output/lora; without a file, a small model learns the digits 0 to 4
first. The folder gets lora.npz, the small matrices and the head, and merged.npz, the whole model.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # vitfn need not be installed

import vitfn
from vitfn import data, lora, optim, tree, weights
from vitfn.containers import write_file
from vitfn.data.augment import normalise
from vitfn.data.batches import batch_indices
from vitfn.data.crops import resize
from vitfn.tree import Tree

BATCH = 32
Model = Callable[[Tree], Tree]  # what is trained -> the parameters of a whole model


def prepared(images: Tensor, config: vitfn.ViTConfig) -> Tensor:
    """Pixels (B, C, H, W) of any size as the model takes them."""
    return normalise(resize(images, config.image_hw), config)


def whole(params: Tree, small: Tree) -> Tree:
    """The model that `small`, {"lora": matrices, "head": parameters}, makes of the frozen one."""
    return lora.merge({**params, "head": small["head"]}, small["lora"])


def trained(leaves: Tree, model: Model, config: vitfn.ViTConfig, split: data.Split, steps: int, rate: float) -> Tree:
    """The leaves after `steps` of AdamW on them alone."""
    optimizer = vitfn.adamw(vitfn.warmup_cosine(rate, steps, steps // 10))

    def loss(leaves: Tree, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(vitfn.apply(model(leaves), images, config), labels)

    state = optimizer.init(leaves)
    for step in range(steps):
        images, labels = (each[batch_indices(split.size, BATCH, 0, step)] for each in split)
        grads = torch.func.grad(loss)(leaves, prepared(images, config), labels)
        factor = optim.clipping(tree.norm(grads), 1.0)
        leaves, state = optimizer.update(grads, state, leaves, torch.tensor(step), scale=factor)
    return leaves


@torch.no_grad()
def logits(params: Tree, images: Tensor, config: vitfn.ViTConfig) -> Tensor:
    """Of pixels (N, C, H, W), a batch at a time: (N, K)."""
    return torch.cat([vitfn.apply(params, prepared(some, config), config) for some in images.split(BATCH)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FILE", help="weights in any layout (default: a small model is trained)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default=lora.TARGETS, help="regular expression over the kernels' whole paths")
    parser.add_argument("--steps", type=int, default=100, help=f"of {BATCH} images each")
    parser.add_argument("--rate", type=float, default=0.02, help="of learning; large models need a smaller one")
    parser.add_argument("--out", type=Path, default=Path("output/lora"), help="folder for the two files")
    args = parser.parse_args()
    train, test, names = data.load("digits")
    found = weights.describe(args.model).config if args.model else vitfn.get_config("ViT-Nano_8")
    config = dataclasses.replace(found, num_classes=len(names))
    if args.model:
        params = vitfn.load(args.model, config)
    else:
        known = data.Split(*(each[train.labels < 5] for each in train))
        params = trained(vitfn.init(config), lambda leaves: leaves, config, known, 100, 3e-3)
    start = {"lora": lora.init(params, args.rank, targets=args.targets), "head": params["head"]}
    small = trained(start, lambda leaves: whole(params, leaves), config, train, args.steps, args.rate)
    for name, leaves in (("before", start), ("after", small)):
        right = logits(whole(params, leaves), test.images, config).argmax(-1) == test.labels
        print(f"{name:<8}{right.float().mean():.1%} of the test images")
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / "lora.npz", tree.flatten(small).items())
    vitfn.save(args.out / "merged.npz", whole(params, small), config, names)
    part = tree.size(small) / tree.size(params)
    print(f"stored  {tree.size(small):,} of {tree.size(params):,} parameters, {part:.2%}, rank {args.rank}")
    with np.load(args.out / "lora.npz") as arrays:
        stored = tree.unflatten({path: torch.from_numpy(array) for path, array in arrays.items()})
    models = whole(params, stored), vitfn.load(args.out / "merged.npz", config)
    a, b = (logits(model, test.images, config) for model in models)
    print(f"merged  the file's logits are within {(a - b).abs().max() / a.abs().max():.1e} of the largest")


if __name__ == "__main__":
    main()
