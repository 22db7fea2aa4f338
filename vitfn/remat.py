"""Recomputing: activations that backward needs are computed again instead of kept (Chen et al., arXiv 1604.06174)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitfn import tree
from vitfn.tree import Tree

KINDS = ("none", "attention", "block")  # what of an encoder block is recomputed, the least first


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function(params, x, ...)`, of which backward keeps the parameters and the tensors it is given alone.

    They are given one by one, so that hooks of saved tensors see them; randomness must not be drawn inside.
    """

    def run(params: Tree, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        flat = tree.flatten(params)
        paths = list(flat)  # what follows must not keep the leaves: gathered ones would stay whole

        def inner(x: Tensor, *leaves: Tensor) -> Tensor:
            return function(tree.unflatten(dict(zip(paths, leaves, strict=True))), x, *rest, **named)

        return checkpoint(inner, x, *flat.values(), use_reentrant=False, preserve_rng_state=False)

    return run
