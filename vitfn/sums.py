"""The gradients of an update summed over the ranks of a mesh, those that are watched while backward still computes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from vitfn import tree
from vitfn.gathering import by_subtree
from vitfn.meshes import Cuts, Mesh
from vitfn.tree import Tree


class Sums:
    """One update's sums, in float32: of whole leaves over all ranks, of those at `split` this process's part of them.

    The gradients of leaves at `sharded` come as parts, summed over the ranks that share a copy (vitfn.gathering).
    """

    def __init__(self, mesh: Mesh, sharded: Cuts, split: Cuts):
        self._mesh, self._sharded, self._split = mesh, sharded, split
        self._sums: dict[str, Tensor] = {}
        self._waiting: list[Callable[[], None]] = []

    def watched(self, leaves: Tree) -> Tree:
        """The leaves, to be differentiated: as soon as autograd has the gradients of a subtree, their sum begins."""
        flat = {path: leaf.view_as(leaf) for path, leaf in tree.flatten(leaves).items()}  # leaves take no such hooks
        for paths in by_subtree(path for path in flat if path not in self._sharded).values():
            register_multi_grad_hook([flat[path] for path in paths], partial(self._begin, paths))
        return tree.unflatten(flat)

    def __call__(self, grads: Tree, value: Tensor) -> tuple[Tree, Tensor]:
        """The sums of all gradients, and of a number."""
        flat = tree.flatten(grads)
        left = {path: leaf for path, leaf in flat.items() if path not in self._sums and path not in self._sharded}
        self._begin([*left, ""], [*left.values(), value])
        for wait in self._waiting:
            wait()
        self._waiting.clear()  # a collective's work keeps what it was given
        flat |= self._sums
        parts = {path: leaf for path, leaf in flat.items() if path in self._sharded or path in self._split}
        if parts and self._mesh.copies > 1:
            sums, wait = self._sum(parts, self._mesh.grid.get_group("data"))
            wait()
            flat |= sums
        value = flat.pop("")
        return tree.unflatten(flat), value

    def _begin(self, paths: list[str], grads: list[Tensor | None]) -> None:
        """Begins the sums of some gradients; None is that of a leaf on which the loss does not depend."""
        found = {path: grad for path, grad in zip(paths, grads, strict=True) if grad is not None}
        for path, dim in self._split.items():  # in the same order in every process
            if path in found:
                self._sums[path], wait = self._mesh.scatter(found.pop(path), dim)
                self._waiting.append(wait)
        if found:
            sums, wait = self._sum(found, None)
            self._sums |= sums
            self._waiting.append(wait)

    def _sum(self, leaves: Mapping[str, Tensor], group: Any) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Begins one collective over a group, or all: the sums, the same bits in each, and what waits for them."""
        everything = torch.cat([leaf.reshape(-1) for leaf in leaves.values()])
        with self._mesh.ranks.together():
            work = dist.all_reduce(everything, group=group, async_op=True)
        parts = everything.split([leaf.numel() for leaf in leaves.values()])

        def wait() -> None:
            with self._mesh.ranks.together():
                work.wait()

        return {path: part.view(leaf.shape) for (path, leaf), part in zip(leaves.items(), parts, strict=True)}, wait
