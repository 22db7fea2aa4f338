"""Who is lost: in every process a thread answers for it, so that one that is killed, stopped or hung can be named."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

_ANSWER = 5.0  # seconds that a process has to answer; its thread needs milliseconds
_GRACE = 10.0  # seconds in which a process that has been asked finds out by itself, as _ANSWER lets it
_FOREVER = timedelta(days=20)  # the store counts milliseconds in 32 bits


class Answer(NamedTuple):
    """How many collectives a process has begun, and what it does: `at` a line of code, or nothing if it has ended."""

    begun: int
    at: str


def verdict(answers: Mapping[int, Answer], count: int) -> str:
    """Which of the processes 0 to `count` - 1 is lost, by what each has answered, as the end of a sentence."""
    if silent := [rank for rank in range(count) if rank not in answers]:
        numbers = ", ".join(map(str, silent))
        which = f"process {numbers} does" if len(silent) == 1 else f"processes {numbers} do"
        return f"{which} not answer: killed, stopped or cut off"
    furthest = max(answer.begun for answer in answers.values())
    behind = {rank: answer.at for rank, answer in answers.items() if answer.begun < furthest}
    return (
        "; ".join(
            f"process {rank} " + (f"hangs or is late, {at}" if at else "has ended") for rank, at in behind.items()
        )
        or "all of them answer: the network fails, or --timeout is too short"
    )


class Watch:
    """The thread that answers for this process, and the question that it asks the others; `begun` counts collectives.

    `connect` makes clients of the store that all share: a client serves one caller at a time, and the thread waits in
    its own. `keeper` is who keeps the store, `keeps` whether this process does. Nothing is sent before somebody asks.
    """

    def __init__(self, connect: Callable[[], dist.Store], rank: int, count: int, keeper: str, keeps: bool):
        self.begun = 0
        self._rank, self._count, self._keeper, self._keeps = rank, count, keeper, keeps
        self._store, self._ears = connect(), connect()
        self._ending, self._closed, self._reachable = threading.Event(), False, True
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leaves this process's last answer and ends the thread: in torch's C++ at the interpreter's end it aborts."""
        self._closed = True
        self._ending.set()
        if self._reachable:  # else the thread has ended with the store, or never comes back from a stopped one's
            with contextlib.suppress(RuntimeError):
                self._store.set(f"asked/{self._rank}", "")
        self._thread.join(_ANSWER if self._reachable else 1)

    def lost(self) -> str:
        """Asks all processes; which of them is lost, as the end of a sentence. Takes up to 7 seconds."""
        self._ending.set()
        answers: dict[int, Answer] = {}
        asking = threading.Thread(target=self._ask, args=(answers,), daemon=True)
        asking.start()
        asking.join(_ANSWER + 2)
        self._reachable = self._rank in answers  # without its store, or with a stopped one's, nobody has answered
        if self._keeps and self._reachable:
            self._stay(answers)
        return verdict(answers, self._count) if self._reachable else f"{self._keeper} does not answer"

    def _ask(self, answers: dict[int, Answer]) -> None:
        found: dict[int, Answer] = {}
        with contextlib.suppress(RuntimeError):  # the store is gone
            for rank in range(self._count):
                self._store.set(f"asked/{rank}", "")
            until = time.monotonic() + _ANSWER
            while len(found) < self._count and time.monotonic() < until:
                time.sleep(0.05)
                for rank in set(range(self._count)) - set(found):
                    if self._store.check([f"answer/{rank}"]):
                        begun, at = self._store.get(f"answer/{rank}").decode().split(" ", 1)
                        found[rank] = Answer(int(begun), at)
            answers.update(found)
            self._store.set(f"knows/{self._rank}", "")

    def _stay(self, answers: Mapping[int, Answer]) -> None:
        """Keeps the store for those who find out a little later, or they would take this process for the lost one."""
        furthest = max(answer.begun for answer in answers.values())
        others = [f"knows/{rank}" for rank, answer in answers.items() if answer.begun == furthest]
        until = time.monotonic() + _ANSWER
        while not self._store.check(others) and time.monotonic() < until:
            time.sleep(0.05)

    def _listen(self) -> None:
        """Waits to be asked, answers once, and ends a process that does not notice that its peers have ended."""
        try:
            while True:
                with contextlib.suppress(dist.DistStoreError):  # not asked for so long
                    self._ears.wait([f"asked/{self._rank}"], _FOREVER)
                    break
            self._ears.set(f"answer/{self._rank}", f"{self.begun} {'' if self._closed else _whereabouts()}")
        except RuntimeError:  # the store is gone: nobody can ask
            return
        if not self._ending.wait(_GRACE):
            why = "the others gave up waiting, for it or another"
            print(f"vitfn, process {self._rank}: ended, {_whereabouts()}: {why}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may never come back to where it would see an exception


def _whereabouts() -> str:
    """Where in vitfn, or else in whatever has called it, the main thread is."""
    frame: Any = sys._current_frames()[threading.main_thread().ident or 0]
    while frame.f_back and not frame.f_globals.get("__name__", "").startswith("vitfn"):
        frame = frame.f_back
    return f"at {os.path.basename(frame.f_code.co_filename)}, line {frame.f_lineno}, in {frame.f_code.co_name}"
