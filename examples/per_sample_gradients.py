"""Gradients, and gradient norms, of each image at once: vmap of grad over a batch, beside a loop over its images.

python examples/per_sample_gradients.py --model=ViT-Ti_16 --batch=16
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # vitfn need not be installed

import vitfn
from vitfn import flops, timing, tree
from vitfn.tree import Tree


def gradient(config: vitfn.ViTConfig) -> Callable[..., Tree]:
    """(params, image (C, H, W), label 0-d) -> the gradient of the image's cross-entropy, a tree like params."""

    def loss(params: Tree, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(vitfn.apply(params, image[None], config), label[None])

    return torch.func.grad(loss)


def gradient_norm(config: vitfn.ViTConfig) -> Callable[..., Tensor]:
    """(params, image (C, H, W), label 0-d) -> the norm of the whole gradient, 0-d, of which nothing else is kept."""
    one = gradient(config)  # vmap knows no foreach functions, which tree.norm uses
    return lambda *given: torch.stack([torch.linalg.vector_norm(leaf) for leaf in tree.leaves(one(*given))]).norm()


def at_once(function: Callable, chunk: int | None = None) -> Callable:
    """(params, images (B, C, H, W), labels (B,)) -> `function` of each image, stacked: leaves (B, ...).

    A `chunk` of images is computed at a time, by default all.
    """
    return torch.func.vmap(function, in_dims=(None, 0, 0), chunk_size=chunk)


def looped(function: Callable) -> Callable:
    """(params, images (B, C, H, W), labels (B,)) -> a list of `function` of each image, one after the other."""
    return lambda params, images, labels: [function(params, *one) for one in zip(images, labels, strict=True)]


def largest_error(found: Tree, reference: Tree) -> float:
    """The largest ‖found - reference‖ / max(‖reference‖, ‖the image's whole gradient‖ / 1000) of all images' arrays.

    Leaves are (B, ...). What is below a thousandth of the whole has the rounding of the rest.
    """

    def norms(gradients: Tree) -> Tensor:  # (leaves, B)
        return torch.stack([torch.linalg.vector_norm(leaf.flatten(1), dim=1) for leaf in tree.leaves(gradients)])

    sizes = norms(reference)
    return float((norms(tree.map(torch.sub, found, reference)) / sizes.maximum(sizes.norm(dim=0) / 1000)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-Nano_8", help="a name that vitfn.get_config knows")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--chunk", type=int, help="images that vmap computes at a time (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="in which the loop and vmap are timed in turn")
    args = parser.parse_args()
    config, generator = vitfn.get_config(args.model), torch.Generator().manual_seed(0)
    params = vitfn.init(config, seed=0)
    params["head"]["kernel"].normal_(0, 0.1, generator=generator)  # below a new head, zero, all gradients would be zero
    images = torch.randn(args.batch, config.channels, *config.image_hw, generator=generator)
    labels = torch.randint(config.num_classes, (args.batch,), generator=generator)
    batch, one, norm = (params, images, labels), gradient(config), gradient_norm(config)
    calls = {
        "gradients, loop": lambda: looped(one)(*batch)[-1]["head"]["bias"].sum(),
        "gradients, at once": lambda: at_once(one, args.chunk)(*batch)["head"]["bias"].sum(),
        "norms, loop": lambda: looped(norm)(*batch)[-1],
        "norms, at once": lambda: at_once(norm, args.chunk)(*batch).sum(),
    }
    found = timing.steady(calls, args.rounds, limit=300)
    print(f"{config.name}, {args.batch} images, {torch.get_num_threads()} threads")
    print(f"{'':<10}{'loop':>13}{'at once':>13}   loop / at once (quartiles)")
    for name in ("gradients", "norms"):
        loop, together = found[f"{name}, loop"], found[f"{name}, at once"]
        ratios = statistics.quantiles([a / b for a, b in zip(loop, together, strict=True)], n=4, method="inclusive")
        times = "".join(f"{1000 * statistics.median(each):>10.1f} ms" for each in (loop, together))
        print(f"{name:<10}{times}   {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})")
    one_by_one = tree.map(lambda *leaves: torch.stack(leaves), *looped(one)(*batch))
    print(f"largest relative error of an array: {largest_error(at_once(one, args.chunk)(*batch), one_by_one):.1e}")
    rate = args.batch * flops.needed_flops(config, training=True) / statistics.median(found["gradients, loop"])
    share = rate / flops.measured_peak("cpu", torch.float32)
    print(f"the loop runs at {share:.0%} of a large matrix product's rate: the most to gain is {1 / share:.1f} times")


if __name__ == "__main__":
    main()
