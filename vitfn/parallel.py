"""Several processes, each with a device of its own and a share of every batch, as torchrun starts them."""

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from vitfn import device
from vitfn.errors import InputError, RunError, one_line


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among `count`: `rank` of all, from 0, and `local` of those on its machine.

    `host` is the process group of what the hosts tell each other; gradients go through the devices' own. `saving` is
    one for the thread that writes checkpoints while the others are in use.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    host: Any = None
    saving: Any = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def span(self, size: int) -> tuple[int, int]:
        """Where this process's share of so many images starts and ends: of a batch that can be, even shares."""
        return self.rank * size // self.count, (self.rank + 1) * size // self.count

    def gather(self, of_each: Any) -> list[Any]:
        """What each process has, in order, in all of them; tensors are on the CPU."""
        if self.count == 1:
            return [of_each]
        found = [None] * self.count
        with together():
            dist.all_gather_object(found, of_each, group=self.host)
        return found

    def max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        found = torch.tensor(int(number))
        with together():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        return int(found)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does this before the others, so that it alone downloads, or says what is wrong."""
        if not self.first:
            self.max(0)
        yield
        if self.first:
            self.max(0)


ALONE = Ranks()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A collective of all processes: where it fails, the others are lost."""
    try:
        yield
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise RunError(
            f"the processes of the run lost each other: one of them has ended, or hangs ({reason})"
        ) from None


def process_name() -> str:
    """What a line on stderr begins with: it names the process where there are several."""
    return "vitfn" + (f", process {os.environ.get('RANK')}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "")


def from_environment(local_rank: int = -1) -> Ranks:
    """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; older launchers pass --local_rank instead of the last."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, count, local = (int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, -1), strict=True))
    if local_rank > 0 and "WORLD_SIZE" not in os.environ:
        raise InputError(f"--local_rank={local_rank}: found no WORLD_SIZE in the environment; start it with torchrun")
    if -1 not in (local, local_rank) and local != local_rank:
        raise InputError(f"--local_rank: found {local_rank}, expected {local}, torchrun's LOCAL_RANK")
    return Ranks(rank, count, max(local, local_rank, 0))


@contextlib.contextmanager
def joined(ranks: Ranks, row: device.Device) -> Iterator[Ranks]:
    """The ranks connected, each with its device selected, while the context lasts."""
    device.select(row, ranks.local)
    if ranks.count == 1:
        yield ranks
        return
    dist.init_process_group(row.collectives)
    host, saving = (dist.new_group(backend="gloo") for _ in range(2))
    try:
        yield dataclasses.replace(ranks, host=host, saving=saving)
    finally:
        # torch 2.7 holds the interpreter's lock while it ends a group of Gloo and waits for its threads, which may need
        # the lock to free a tensor: one more reference leaves the groups to the end of the process.
        for group in (dist.group.WORLD, host, saving):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        dist.destroy_process_group()
