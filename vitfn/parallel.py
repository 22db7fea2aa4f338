"""Several processes, each with a device of its own and a share of every batch, as torchrun starts them."""

import contextlib
import ctypes
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from vitfn import device
from vitfn.errors import InputError, RunError, one_line
from vitfn.watch import Watch

TIMEOUT = 600  # seconds: first compiles, and what one process writes, may differ by minutes
_BEFORE = 30  # seconds by which the hosts' timeout comes before a device's own, which ends a process without a name


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among `count`: `rank` of all, from 0, and `local` of those on its machine.

    `host` is the process group of what the hosts tell each other; gradients go through the devices' own. `saving` is
    one for the thread that writes checkpoints while the others are in use. `watch` names who is lost, `timeout` is how
    many seconds later. `store` is torchrun's, which lives through its restarts.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    host: Any = None
    saving: Any = None
    watch: Watch | None = None
    store: dist.Store | None = None
    timeout: int = TIMEOUT

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
        with self.together():
            dist.all_gather_object(found, of_each, group=self.host)
        return found

    def max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        found = torch.tensor(int(number))
        with self.together():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        return int(found)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what all processes do at once. Raises RunError, which names who is lost, where that fails."""
        if self.watch is None:
            yield
            return
        self.watch.begun += 1
        try:
            yield
        except RuntimeError as error:
            lost = self.watch.lost()
            raise RunError(f"the processes of the run lost each other: {lost} ({one_line(error, 200)})") from None

    def divided(self, groups: list[list[int]]) -> Any:
        """The process group of the ranks that this one is with in one of `groups`; all ranks ask for it together."""
        own, _ = dist.new_subgroups_by_enumeration(groups, timeout=timedelta(seconds=self.timeout))
        return _kept(own)

    def remember(self, what: str) -> None:
        """Notes something for the next start of the same job by torchrun."""
        if self.store and self.first:
            self.store.set(what, "")

    def remembers(self, what: str) -> bool:
        """Whether an earlier start of the same job by torchrun noted it: the same answer in all processes."""
        return bool(self.max(int(self.first and self.store is not None and self.store.check([what]))))

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does this before the others, so that it alone downloads, or says what is wrong."""
        if not self.first:
            self.max(0)
        yield
        if self.first:
            self.max(0)


ALONE = Ranks()


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
def joined(ranks: Ranks, row: device.Device, timeout: int = TIMEOUT) -> Iterator[Ranks]:
    """The ranks connected, each with its device selected, while the context lasts.

    `timeout` is how many seconds a process waits for the others in a collective, and at the start.
    """
    device.select(row, ranks.local)
    # torchrun's agent keeps the store, and keeps it through restarts; started by hand, the first process does
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if ranks.count == 1:
        yield dataclasses.replace(ranks, store=_store(ranks, launched, timeout) if launched else None)
        return
    store = _store(ranks, launched, timeout)
    # torch 2.7 and later share one store among all restarts; without a place of its own each would find the last one's
    place = f"vitfn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    watch = Watch(
        lambda: dist.PrefixStore(place, _store(ranks, True, timeout)),
        ranks.rank,
        ranks.count,
        "the first machine's torchrun" if launched else "process 0",
        keeps=ranks.first and not launched,
    )
    ranks = dataclasses.replace(ranks, watch=watch, store=store if launched else None, timeout=timeout)
    try:
        with ranks.together():
            later = timeout if row.collectives == "gloo" else timeout + _BEFORE
            dist.init_process_group(
                row.collectives,
                store=dist.PrefixStore(place, store),
                rank=ranks.rank,
                world_size=ranks.count,
                timeout=timedelta(seconds=later),
            )
            _kept(dist.group.WORLD)
            host = _kept(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))
            saving = _kept(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))
        ranks = dataclasses.replace(ranks, host=host, saving=saving)
        yield ranks
        watch.close()
        ranks.max(0)  # the first process may keep the store, so it ends after the others' threads
    finally:
        watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _kept(group: Any) -> Any:
    """The group, which lives to the end of the process.

    torch 2.7 holds the interpreter's lock while it ends a group of Gloo and waits for its threads, which may need the
    lock to free a tensor.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    return group


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code.

    One of several ends without the interpreter's own end: a thread of Gloo's that frees a tensor while the interpreter
    ends cannot have its lock, and aborts the process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _store(ranks: Ranks, kept: bool, timeout: int) -> dist.Store:
    """A client of the store where the processes meet; unless it is `kept` by another, the first process keeps it."""
    try:
        where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as missing:
        raise InputError(
            f"WORLD_SIZE={ranks.count}: found no {missing.args[0]} in the environment; start it with torchrun"
        ) from None
    try:
        keeps = ranks.first and not kept
        return dist.TCPStore(where, port, None, keeps, timedelta(seconds=timeout), wait_for_workers=False)
    except RuntimeError as error:
        raise RunError(f"MASTER_ADDR={where}, MASTER_PORT={port}: no store there ({one_line(error, 200)})") from None
