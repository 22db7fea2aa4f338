"""Trees of named leaves: nested dicts whose '/'-joined paths are the names in Google's npz files."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Any]  # str -> Tree or leaf


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves by path, in the tree's own order: {'head/kernel': leaf, ...}."""
    flat = {}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            flat.update(flatten(child, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = child
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def leaves(tree: Mapping[str, Any]) -> list[Any]:
    """The leaves in the tree's own order."""
    return list(flatten(tree).values())


def map(function: Callable, tree: Mapping[str, Any], *rest: Mapping[str, Any]) -> Tree:
    """`function` of each leaf and of the leaves at the same path of the other trees."""
    return {
        name: map(function, child, *(other[name] for other in rest))
        if isinstance(child, Mapping)
        else function(child, *(other[name] for other in rest))
        for name, child in tree.items()
    }


def matches(pattern: str, path: str) -> bool:
    """Whether a whole path matches the regular expression: how names select leaves, everywhere."""
    return bool(re.fullmatch(pattern, path))


def select(tree: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """The leaves whose whole path matches the regular expression, by path."""
    return {path: leaf for path, leaf in flatten(tree).items() if matches(pattern, path)}


def to(tree: Mapping[str, Any], *args, **kwargs) -> Tree:
    """`tensor.to(...)` of each leaf: another device, another dtype."""
    return map(lambda leaf: leaf.to(*args, **kwargs), tree)


def clone(tree: Mapping[str, Any]) -> Tree:
    """The same tree in memory of its own."""
    return map(lambda leaf: leaf.clone(), tree)


def stack(trees: Sequence[Mapping[str, Any]]) -> Tree:
    """Trees of the same paths and shapes as one, whose leaves have a new first axis: (...) each -> (k, ...)."""
    return map(lambda *leaves: torch.stack(leaves), *trees)


def unstack(tree: Mapping[str, Any]) -> list[Tree]:
    """The inverse of `stack`: k trees, whose leaves are views."""
    return [map(lambda leaf: leaf[i], tree) for i in range(len(leaves(tree)[0]))]


def norm(tree: Mapping[str, Any]) -> Tensor:
    """The Euclidean norm of all leaves together: 0-d float32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(leaves(tree))))


def size(tree: Mapping[str, Any]) -> int:
    """How many numbers the leaves hold."""
    return sum(leaf.numel() for leaf in leaves(tree))
