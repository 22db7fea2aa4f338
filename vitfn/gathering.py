"""Sharded parameters, whole while a part of the model needs them: gathered, freed after use, gathered for its backward.

(ZeRO-3, Rajbhandari et al., arXiv 1910.02054, section 5.3.) Parts are the subtrees that `vit.forward` looks up.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vitfn import tree
from vitfn.meshes import Cuts, Mesh
from vitfn.tree import Tree

_CAST = r"(?!.*conv).*kernel"  # factors of matrix products, which autocast casts


@contextmanager
def lent(params: Tree, cuts: Cuts, mesh: Mesh, dtype: torch.dtype | None, ahead: bool) -> Iterator[Tree]:
    """`params` with the leaves at `cuts`, parts along a dimension, made whole when their subtree is looked up.

    What autograd would keep of a whole leaf is gathered again instead; a gradient of one becomes that of the part, in
    float32, summed over the `mesh`. What autocast to `dtype` would cast is cast before, to the same numbers with less
    to send and to keep. With `ahead` the next block is gathered while one computes.
    """
    loan = _Loan(tree.flatten(params), cuts, mesh, dtype, ahead)
    with torch.autograd.graph.saved_tensors_hooks(loan.pack, loan.unpack):
        yield _Lent(params, "", loan)
        loan.drop()


class _Lent(dict):
    """A tree that asks a loan for the subtrees that hold leaves."""

    def __init__(self, subtree: Tree, prefix: str, loan: "_Loan"):
        super().__init__(subtree)
        self._prefix, self._loan = prefix, loan

    def __getitem__(self, name: str) -> Any:
        path = self._prefix + name
        if path == "Transformer":
            return _Lent(super().__getitem__(name), "Transformer/", self._loan)
        return self._loan.subtree(path) if path in self._loan.subtrees else super().__getitem__(name)


class _Loan:
    """The subtree that is whole at the moment, and the one that is on its way."""

    def __init__(self, leaves: dict[str, Tensor], cuts: Cuts, mesh: Mesh, dtype: torch.dtype | None, ahead: bool):
        self._leaves, self._cuts, self._mesh, self._dtype, self._ahead = leaves, cuts, mesh, dtype, ahead
        self._paths = by_subtree(leaves)
        self.subtrees = by_subtree(path for path in leaves if path in cuts)  # of cut leaves alone
        self._whole: tuple[str, dict[str, Tensor]] = ("", {})  # one subtree's leaves by path
        self._coming: tuple[str, list[Callable[[], Tensor]]] = ("", [])
        self._summing: list[Callable[[], None]] = []  # of gradients, one subtree's

    def drop(self) -> None:
        self._whole, self._coming = ("", {}), ("", [])

    def subtree(self, name: str) -> Any:
        """The whole subtree, of which autograd knows."""
        if self._whole[0] != name:
            paths, waiting = self.subtrees[name], self._awaited(name)
            parts = [self._leaves[path] for path in paths]
            dims = [self._cuts[path] for path in paths]
            whole = _Whole.apply(self, waiting, dims, *parts)
            self._whole = name, dict(zip(paths, whole, strict=True))
            self._start_beside(name, 1)
        if name in self._leaves:  # a subtree of one leaf
            return self._whole[1][name]
        found = {path: self._whole[1].get(path, self._leaves[path]) for path in self._paths[name]}
        return tree.unflatten({path.removeprefix(name + "/"): leaf for path, leaf in found.items()})

    def _awaited(self, name: str) -> list[Callable[[], Tensor]]:
        """What gathers a subtree, begun before or now; the one before it is let go first."""
        self._whole = ("", {})
        coming, self._coming = self._coming, ("", [])
        return coming[1] if coming[0] == name else self._start(name)

    def _start(self, name: str) -> list[Callable[[], Tensor]]:
        def part(path: str) -> Tensor:
            leaf = self._leaves[path].detach()
            return leaf.to(self._dtype) if self._dtype and tree.matches(_CAST, path) else leaf

        return [self._mesh.gather(part(path), self._cuts[path]) for path in self.subtrees[name]]

    def _start_beside(self, name: str, step: int) -> None:
        names = list(self.subtrees)
        place = names.index(name) + step
        if self._ahead and 0 <= place < len(names):
            self._coming = names[place], self._start(names[place])

    def pack(self, saved: Tensor) -> Any:
        """What autograd keeps of a tensor: itself, or where to find it in a leaf that can be gathered again."""
        memory = saved.untyped_storage().data_ptr()
        for path, leaf in self._whole[1].items():  # alive, so that no other tensor has its memory
            if leaf.untyped_storage().data_ptr() == memory and leaf.dtype == saved.dtype:
                return path, saved.shape, saved.stride(), saved.storage_offset()
        return saved

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        path, *geometry = kept
        if self._whole[0] != (name := subtree_of(path)):
            waiting = self._awaited(name)
            self._whole = name, {own: finish() for own, finish in zip(self.subtrees[name], waiting, strict=True)}
            self._start_beside(name, -1)
        return self._whole[1][path].as_strided(*geometry)

    def sums(self, grads: list[Tensor], dims: list[int], needed: list[bool]) -> list[Tensor | None]:
        """The parts of the gradients' sums, which are there once the backward pass is over.

        They are summed while the block below computes, and waited for before that one's.
        """
        self.settle()
        torch.autograd.Variable._execution_engine.queue_callback(self.settle)
        parts: list[Tensor | None] = []
        for grad, dim, need in zip(grads, dims, needed, strict=True):
            part, wait = self._mesh.scatter(grad.float(), dim) if need else (None, None)
            parts.append(part)
            self._summing += [wait] if wait else []
        return parts

    def settle(self) -> None:
        for wait in self._summing:
            wait()
        self._summing = []


def subtree_of(path: str) -> str:
    """The subtree that `vit.forward` looks up for a leaf."""
    return "/".join(path.split("/")[: 2 if path.startswith("Transformer/") else 1])


def by_subtree(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths by their subtree, in their order."""
    subtrees: dict[str, list[str]] = {}
    for path in paths:
        subtrees.setdefault(subtree_of(path), []).append(path)
    return subtrees


class _Whole(torch.autograd.Function):
    """Whole leaves of parts, and parts of the gradients' sums."""

    @staticmethod
    def forward(ctx, loan, waiting, dims, *parts):
        ctx.loan, ctx.dims = loan, dims
        whole = tuple(finish() for finish in waiting)
        ctx.mark_non_differentiable(
            *(leaf for leaf, needed in zip(whole, ctx.needs_input_grad[3:], strict=True) if not needed)
        )
        return whole

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *ctx.loan.sums(grads, ctx.dims, needed)
