"""Differentially private SGD (Abadi et al., arXiv 1607.00133): each image's gradient clipped, their sum with noise.

The accounting is left to a library, such as Opacus' accountants or dp-accounting: what they ask for is printed.
Whoever knows the seed can take the noise away again: where privacy matters, keep it secret, and draw from a
cryptographic source.
"""

import argparse
import math
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # vitfn need not be installed

import vitfn
from vitfn import data, rng, tree
from vitfn.data.augment import normalise
from vitfn.optim import clipping
from vitfn.tree import Tree


def lot(count: int, rate: float, seed: int, step: int) -> Tensor:
    """The images of a step: of `count` each with probability `rate`, independently (Poisson sampling): (B,) int64."""
    key = rng.fold_in(rng.stream(seed, "lot"), step)
    return (rng.uniform(torch.tensor(key), count) < rate).nonzero()[:, 0]


def clipped_sum(gradients: Tree, max_norm: float) -> Tree:
    """The sum over images of gradients (B, ...), each scaled down to a norm of at most `max_norm`: leaves (...).

    One image more or less moves it by no more than that, which is its sensitivity.
    """
    norms = [torch.linalg.vector_norm(leaf.flatten(1), dim=1) for leaf in tree.leaves(gradients)]  # (B,) each
    factors = clipping(torch.stack(norms).norm(dim=0), max_norm)  # (B,)
    return tree.map(lambda leaf: torch.tensordot(factors, leaf, dims=1), gradients)


def gaussian(params: Tree, seed: int, step: int) -> Tree:
    """Standard normal numbers, a tree like params: a function of seed, step, path and shape alone."""
    key = rng.fold_in(rng.stream(seed, "privacy"), step)

    def draw(path: str, leaf: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(rng.fold_in(key, zlib.crc32(path.encode())))
        return torch.randn(leaf.shape, generator=generator)

    return tree.unflatten({path: draw(path, leaf) for path, leaf in tree.flatten(params).items()})


def private_gradient(
    params: Tree, images: Tensor, labels: Tensor, config: vitfn.ViTConfig,
    max_norm: float, noise: float, size: float, seed: int, step: int,
) -> Tree:  # fmt: skip
    """(The clipped gradients' sum + noise max_norm N(0, 1)) / size, algorithm 1: images (B, C, H, W), labels (B,).

    `size` is how many images a lot has on average, `noise` the multiplier of which accountants speak.
    """

    def loss(params: Tree, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(vitfn.apply(params, image[None], config), label[None])

    total = clipped_sum(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, images, labels), max_norm)
    if noise:
        total = tree.map(lambda leaf, z: leaf + noise * max_norm * z, total, gaussian(params, seed, step))
    return tree.map(lambda leaf: leaf / size, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lot", type=int, default=128, help="images a step, on average")
    parser.add_argument("--max_norm", type=float, default=1.0, help="what each image's gradient is clipped to")
    parser.add_argument("--noise", type=float, default=1.0, help="the noise's deviation, in units of max_norm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    digits, config = data.load("digits"), vitfn.get_config("ViT-Nano_8", num_classes=10)
    images, tests = (normalise(split.images, config) for split in (digits.train, digits.test))
    optimizer = vitfn.sgd(vitfn.warmup_cosine(0.1, args.steps, args.steps // 10))
    rate = args.lot / len(images)
    settings = {"plain": (math.inf, 0.0), "clipped": (args.max_norm, 0.0), "private": (args.max_norm, args.noise)}
    for name, (max_norm, noise) in settings.items():
        params = vitfn.init(config, args.seed)
        state = optimizer.init(params)
        for step in range(args.steps):
            i = lot(len(images), rate, args.seed, step)
            batch = (images[i], digits.train.labels[i])
            grads = private_gradient(params, *batch, config, max_norm, noise, args.lot, args.seed, step)
            params, state = optimizer.update(grads, state, params, torch.tensor(step))
        right = vitfn.apply(params, tests, config).argmax(-1) == digits.test.labels
        print(f"{name:<8} {right.float().mean():6.1%} of the test images right")
    print(f"for the accountant: sampling rate {rate:.4f}, noise multiplier {args.noise:g}, {args.steps} steps")


if __name__ == "__main__":
    main()
