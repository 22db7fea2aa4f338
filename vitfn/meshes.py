"""A mesh of processes, and where each leaf of a tree lies on it: in every process, cut, or cut for the optimizer alone.

The three are data parallelism, ZeRO-3 and ZeRO-1 (Rajbhandari et al., arXiv 1910.02054). A leaf that is cut is a
DTensor in a TrainState; within a step each process works on its own part, a plain tensor.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vitfn import tree
from vitfn.errors import InputError
from vitfn.parallel import ALONE, Ranks
from vitfn.tree import Tree

KINDS = ("replicated", "optimizer", "sharded")
_WORTH_CUTTING = r".*kernel|.*/pos_embedding|.*/probe"  # what is left are vectors: less than a hundredth of a model
# torch 2.13 warns of the second names, torch 2.7 has no others
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
Cuts = dict[str, int]  # the dimension along which each leaf is cut, by path


@dataclasses.dataclass(frozen=True)
class Mesh:
    """`ranks`, some of which share a copy of the tree: `grid` is their DeviceMesh ("shard", "data"), where any do.

    `rules` are (regular expression over whole paths, kind), the first that matches decides; others are replicated. A
    batch is divided among all ranks, whichever their place.
    """

    ranks: Ranks = ALONE
    device: str = "cpu"
    grid: Any = None
    rules: tuple[tuple[str, str], ...] = ()

    @property
    def shards(self) -> int:
        """How many processes share a copy of the tree."""
        return self.grid.size(0) if self.grid else 1

    @property
    def copies(self) -> int:
        return self.ranks.count // self.shards

    def cuts(self, shapes: Mapping[str, tuple[int, ...]], kind: str) -> Cuts:
        """Which of the leaves are of a kind, and cut where: along the first dimension, or the largest that can be.

        A leaf of which no dimension is a multiple of the shards stays whole.
        """
        found = {}
        for path, shape in shapes.items() if self.grid else ():
            if kind == next((kind for pattern, kind in self.rules if tree.matches(pattern, path)), "replicated"):
                even = [dim for dim, size in enumerate(shape) if size % self.shards == 0]
                if even:
                    found[path] = 0 if even[0] == 0 else max(even, key=lambda dim: shape[dim])
        return found

    def part(self, leaf: Tensor, dim: int) -> Tensor:
        """This process's part of a leaf: a view."""
        return leaf.chunk(self.shards, dim)[self.grid.get_local_rank("shard")]

    def cut(self, part: Tensor, dim: int) -> Tensor:
        """The leaf, a DTensor, of which this process has this part."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        return DTensor.from_local(part, self.grid, [Shard(dim), Replicate()], run_check=False)

    def placed(self, params: Tree) -> Tree:
        """The parameters as a TrainState has them."""
        return tree.unflatten({path: self.place(path, leaf) for path, leaf in tree.flatten(params).items()})

    def place(self, path: str, leaf: Tensor) -> Tensor:
        """A parameter as a TrainState has it: of one that is sharded, this process's part, in memory of its own."""
        for dim in self.cuts({path: tuple(leaf.shape)}, "sharded").values():
            return self.cut(self.part(leaf, dim).to(self.device, copy=True, memory_format=torch.contiguous_format), dim)
        return leaf.to(self.device)

    def updated(self, params: Tree) -> Tree:
        """The parameters as an optimizer's `init` is to see them: of what it updates here, this process's part."""
        flat = tree.flatten(params)
        for path, dim in self.cuts({path: leaf.shape for path, leaf in flat.items()}, "optimizer").items():
            flat[path] = self.cut(self.part(flat[path], dim).contiguous(), dim)
        return tree.unflatten(flat)

    def norm(self, grads: Tree, cuts: Cuts) -> Tensor:
        """The Euclidean norm of a tree of whole leaves and, at `cuts`, of parts."""
        flat = tree.flatten(grads)
        parts = {path: leaf for path, leaf in flat.items() if path in cuts}
        if not parts:
            return tree.norm(grads)
        squares = tree.norm(parts).square()
        with self.ranks.together():
            dist.all_reduce(squares, group=self.grid.get_group("shard"))
        whole = {path: leaf for path, leaf in flat.items() if path not in cuts}
        return (squares + (tree.norm(whole).square() if whole else 0)).sqrt()

    def parts(self, params: Tree, split: Cuts) -> Tree:
        """The parameters with this process's part of the leaves at `split`: views, for an update in place."""
        if not split:
            return params
        return tree.unflatten(
            {
                path: self.part(leaf, split[path]) if path in split else leaf
                for path, leaf in tree.flatten(params).items()
            }
        )

    def spread(self, updated: Tree, params: Tree, split: Cuts) -> Tree:
        """The updated parameters with the leaves at `split` whole again, in the memory that they have in `params`."""
        if not split:
            return updated
        parts, flat = tree.flatten(updated), tree.flatten(params)
        for path, dim in split.items():
            parts[path] = flat[path].copy_(self.gather(parts[path], dim)())
        return tree.unflatten(parts)

    def of_parameters(self, params: Tree) -> Tree:
        """Parameters, or averages of them that lie as an optimizer's state does, as a TrainState has parameters."""
        sharded = self.cuts({path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items()}, "sharded")
        flat = tree.flatten(params)
        return tree.unflatten({path: leaf if path in sharded else self.whole(leaf) for path, leaf in flat.items()})

    def whole(self, leaf: Any) -> Tensor:
        """The whole of a leaf of a TrainState; of one that is cut, all ranks ask for it together."""
        # not leaf.full_tensor(): torch 2.7 has no functional collectives for devices that others register
        return self.gather(leaf.to_local(), leaf.placements[0].dim)() if is_cut(leaf) else leaf

    def wholes(self, leaves: Tree) -> Mapping[str, Tensor]:
        """Leaves of a TrainState by path, each whole when it is asked for, by all ranks in the same order."""
        return _Wholes(self, tree.flatten(leaves))

    def gather(self, part: Tensor, dim: int) -> Callable[[], Tensor]:
        """Starts to put a leaf together from the parts of those who share it; the result waits, and gives the leaf."""
        group = self.grid.get_group("shard")
        parts = part.new_empty(group.size(), *part.shape)
        with self.ranks.together():
            work: Any = _all_gather(parts.flatten(0, 1), part.contiguous(), group=group, async_op=True)

        def finish() -> Tensor:
            with self.ranks.together():
                work.wait()
            return parts.movedim(0, dim).flatten(dim, dim + 1)  # of dimension 0 without a copy

        return finish

    def scatter(self, leaf: Tensor, dim: int) -> tuple[Tensor, Callable[[], None]]:
        """Starts to sum a leaf over those who share it: this process's part of the sum, and what waits for it."""
        group = self.grid.get_group("shard")
        parts = leaf.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
        part = torch.empty_like(parts[0])
        with self.ranks.together():
            work: Any = _reduce_scatter(part, parts.flatten(0, 1), group=group, async_op=True)

        def wait() -> None:
            with self.ranks.together():
                work.wait()

        return part, wait


class _Wholes(Mapping):
    def __init__(self, mesh: Mesh, leaves: dict[str, Any]):
        self._mesh, self._leaves = mesh, leaves

    def __getitem__(self, path: str) -> Tensor:
        return self._mesh.whole(self._leaves[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


ONE = Mesh()


def make(mesh: str, placement: str, ranks: Ranks, device: str) -> Mesh:
    """The mesh of --mesh, as in data=2,shard=4, with the rules of --placement, for processes that have joined.

    Raises InputError as `sizes` and `rules` do.
    """
    axes = sizes(mesh, ranks.count)
    if axes["shard"] == 1:
        return Mesh(ranks, device)
    from torch.distributed.device_mesh import DeviceMesh

    # neighbours, who are on one machine, share a tree; first in the grid since gradients are scattered before they are
    # summed over the copies
    places = torch.arange(ranks.count).view(axes["data"], axes["shard"])
    groups = [ranks.divided(places.tolist()), ranks.divided(places.T.tolist())]
    grid = DeviceMesh.from_group(groups, device, places.T.contiguous(), mesh_dim_names=("shard", "data"))
    return Mesh(ranks, device, grid, rules(placement))


def sizes(mesh: str, count: int) -> dict[str, int]:
    """The sizes of the axes data and shard for so many processes; one that is not given follows from the other.

    Raises InputError for what is no mesh, or one of another number of processes.
    """
    given = dict(re.findall(r"(data|shard)=([1-9]\d*)(?:,|$)", mesh))
    if ",".join(f"{axis}={size}" for axis, size in given.items()) != mesh:
        raise InputError(f"--mesh: found {mesh!r}, expected sizes as in data=2,shard=4")
    asked = math.prod(map(int, given.values()))
    if count % asked or (len(given) == 2 and count != asked):
        raise InputError(f"--mesh={mesh}: found {count} processes, expected {asked}, or with one axis a multiple of it")
    shard = int(given["shard"]) if "shard" in given else count // asked if given else 1
    return {"data": count // shard, "shard": shard}


def rules(placement: str) -> tuple[tuple[str, str], ...]:
    """(regular expression, kind) for each part of a --placement; KIND alone is for what is worth cutting.

    Raises InputError for an unknown kind, or what is no regular expression.
    """
    found = []
    for part in placement.split(";"):
        pattern, _, kind = part.rpartition("=")
        if kind not in KINDS:
            raise InputError(f"--placement: found {kind!r}, expected one of {', '.join(KINDS)}, or REGEX=one of them")
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"--placement={part}: expected a regular expression, found: {error}") from None
        found.append((pattern or _WORTH_CUTTING, kind))
    return tuple(found)


def is_cut(leaf: Any) -> bool:
    """Whether a leaf of a TrainState is a DTensor (importing that class takes seconds)."""
    return hasattr(leaf, "to_local")


def local(leaf: Any) -> Tensor:
    """What this process has of a leaf of a TrainState, in the same memory."""
    return leaf.to_local() if is_cut(leaf) else leaf


def like(part: Tensor, leaf: Any) -> Tensor:
    """The opposite of `local`: a leaf cut as another one is, of which this process has this part."""
    return type(leaf).from_local(part, leaf.device_mesh, leaf.placements, run_check=False) if is_cut(leaf) else part
