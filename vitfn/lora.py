"""Low-rank adaptation (LoRA; Hu et al., arXiv 2106.09685): a tree of small matrices that merges into a model's kernels.

A kernel W is taken as the matrix (I inputs, O outputs) that it multiplies by, and becomes W + alpha / r A B with
A (I, r) and B (r, O): the tree has 'a' and 'b' where the model has the kernel, and r is the rank.
"""

import math
import zlib
from collections.abc import Mapping

import torch

from vitfn import rng, tree
from vitfn.errors import InputError
from vitfn.tree import Tree

TARGETS = r".*/(query|value)/kernel"  # section 4.2 and table 5: of attention's kernels these two are worth the most
Shape = tuple[int, ...]


def matrix_shape(path: str, shape: Shape) -> tuple[int, int]:
    """(I, O) of a kernel: (D, H, d) of query, key and value is (D, H d), (H, d, D) of out is (H d, D), and a patch
    embedding or convolution (P, Q, C, D) is (P Q C, D).
    """
    first = 1 if tree.matches(r"(.*/)?(query|key|value)/kernel", path) else len(shape) - 1
    return math.prod(shape[:first]), math.prod(shape[first:])


def shapes(found: Mapping[str, Shape], rank: int = 8, targets: str = TARGETS) -> dict[str, Shape]:
    """The shapes of a LoRA tree by path, for a model with leaves of the shapes `found` by path (`vitfn.shapes`).

    `targets`, a regular expression over whole paths, says which of the kernels are adapted. Raises InputError where it
    is none, or for a rank below 1.
    """
    if rank < 1:
        raise InputError(f"rank: found {rank}, expected at least 1")
    own: dict[str, Shape] = {}
    for path, shape in found.items():
        if path.endswith("/kernel") and tree.matches(targets, path):
            inputs, outputs = matrix_shape(path, shape)
            own |= {f"{path}/a": (inputs, rank), f"{path}/b": (rank, outputs)}
    if not own:
        raise InputError(f"targets: found {targets!r}, which matches no kernel's path, expected one like {TARGETS}")
    return own


def init(params: Tree, rank: int = 8, seed: int = 0, targets: str = TARGETS) -> Tree:
    """A LoRA tree with which `merge` changes nothing: each a is normal with variance 1 / I, each b is zero.

    Each a is a function of (seed, path, shape) alone. Leaves have the kernels' dtype and device.
    """
    flat, key = tree.flatten(params), rng.stream(seed, "lora")

    def leaf(path: str, shape: Shape) -> torch.Tensor:
        kernel, _, name = path.rpartition("/")
        if name == "b":
            return flat[kernel].new_zeros(shape)
        generator = torch.Generator().manual_seed(rng.fold_in(key, zlib.crc32(path.encode())))
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[0])).to(flat[kernel])

    found = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    return tree.unflatten({path: leaf(path, shape) for path, shape in shapes(found, rank, targets).items()})


def merge(params: Tree, lora: Tree, alpha: float = 8.0) -> Tree:
    """The parameters with W + alpha / r A B in place of each kernel W that `lora` adapts; the other leaves are shared.

    A pure function of both trees, which is also how the small one is trained: by the gradient of `apply` of the merged
    parameters. Raises InputError where `lora` is another model's.
    """
    flat, matrices = tree.flatten(params), tree.flatten(lora)
    merged = dict(flat)
    for path in [path.removesuffix("/a") for path in matrices if path.endswith("/a")]:
        a, b = matrices[f"{path}/a"], matrices[f"{path}/b"]
        if path not in flat or flat[path].numel() != len(a) * b.shape[1]:
            own = f"a kernel of shape {tuple(flat[path].shape)}" if path in flat else "a kernel of the model"
            raise InputError(f"lora: found {path} of {len(a)} inputs and {b.shape[1]} outputs, expected {own}")
        merged[path] = flat[path] + (alpha / len(b) * (a @ b)).reshape(flat[path].shape)
    return tree.unflatten(merged)
