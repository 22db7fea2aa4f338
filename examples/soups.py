"""Arithmetic on whole models: soups, the straight line between two models, and task vectors. Each is a tree.map.

Model soups: Wortsman et al., arXiv 2203.05482; task arithmetic: Ilharco et al., arXiv 2212.04089.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # vitfn need not be installed

import vitfn
from vitfn import data, tree
from vitfn.data.augment import normalise
from vitfn.data.batches import batch_indices
from vitfn.tree import Tree


def soup(models: Sequence[Tree]) -> Tree:
    """The uniform soup: the mean of the models."""
    return tree.map(lambda *leaves: torch.stack(leaves).mean(0), *models)


def greedy_soup(models: Sequence[Tree], score: Callable[[Tree], float]) -> list[Tree]:
    """Its ingredients (recipe 1): from the best on, each model with which the soup's score is no lower."""
    best, *others = sorted(models, key=score, reverse=True)
    chosen = [best]
    for model in others:
        if score(soup([*chosen, model])) >= score(soup(chosen)):
            chosen.append(model)
    return chosen


def between(a: Tree, b: Tree, t: float) -> Tree:
    """The point t of the straight line from a (t = 0) to b (t = 1)."""
    return tree.map(lambda x, y: (1 - t) * x + t * y, a, b)


def add_tasks(start: Tree, models: Sequence[Tree], factors: Sequence[float]) -> Tree:
    """start + sum of factor (model - start): a factor above 0 adds what a model has learnt, one below takes it away."""
    return tree.map(lambda x, *ys: x + sum(f * (y - x) for f, y in zip(factors, ys, strict=True)), start, *models)


def trained(params: Tree, config: vitfn.ViTConfig, images: Tensor, labels: Tensor, steps: int, rate: float, seed: int):
    """The parameters after `steps` of AdamW, the given ones left alone: images (N, C, H, W), labels (N,)."""
    optimizer = vitfn.adamw(vitfn.warmup_cosine(rate, steps, steps // 10), weight_decay=0.05)
    train_step = vitfn.make_train_step(config, optimizer, compile="off")
    state = vitfn.TrainState(0, tree.clone(params), optimizer.init(params))
    for step in range(steps):
        index = batch_indices(len(labels), 32, seed, step)
        state, _ = train_step(state, (images[index], labels[index]))
    return state.params


def measured(params: Tree, config: vitfn.ViTConfig, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss, and accuracy in percent."""
    logits = vitfn.apply(params, images, config)
    return float(F.cross_entropy(logits, labels)), 100 * float((logits.argmax(-1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each fine-tuning; their start is of twice as many")
    steps = parser.parse_args().steps
    digits, config = data.load("digits"), vitfn.get_config("ViT-Nano_8", num_classes=10)
    images, labels = normalise(digits.train.images, config), digits.train.labels
    x, y = normalise(digits.test.images, config), digits.test.labels
    held = torch.arange(len(labels)) % 5 == 0  # the greedy soup chooses by these
    a, b = images[~held], labels[~held]
    start = trained(vitfn.init(config, 0), config, a, b, 2 * steps, 2e-3, seed=0)

    def row(name: str, params: Tree, *parts: Tensor) -> None:
        numbers = [measured(params, config, x[part], y[part]) for part in parts or (y >= 0,)]
        print(f"{name:<34}" + "".join(f"  loss {loss:6.3f}, {accuracy:5.1f} %" for loss, accuracy in numbers))

    row("start", start)
    models = [trained(start, config, a, b, steps, rate, s) for s, rate in enumerate((5e-4, 1e-3, 2e-3, 4e-3), 1)]
    for i, model in enumerate(models):
        row(f"fine-tuned, seed and rate {i + 1}", model)
    chosen = greedy_soup(models, lambda params: measured(params, config, images[held], labels[held])[1])
    row("soup of all", soup(models))
    row(f"greedy soup, of {len(chosen)}", soup(chosen))
    stranger = trained(vitfn.init(config, 1), config, a, b, 3 * steps, 2e-3, seed=9)
    for name, other in (("the same start", models[3]), ("another start", stranger)):
        for t in (0.0, 0.25, 0.5, 0.75, 1.0):
            row(f"{t:.0%} of the way, {name}", between(models[2], other, t))
    tasks = [trained(start, config, a[part], b[part], steps, 2e-3, 20) for part in (b < 5, b >= 5)]
    print(f"{'':<34}  digits 0 to 4          digits 5 to 9")
    for factors in ((0, 0), (1, 0), (0, 1), (0.5, 0.5), (1, 1), (-0.5, 0)):
        row(f"start + {factors[0]:g} low + {factors[1]:g} high", add_tasks(start, tasks, factors), y < 5, y >= 5)


if __name__ == "__main__":
    main()
