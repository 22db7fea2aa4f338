"""A training state on disk: written whole in the background, verified when it is read, the last few kept."""

import copy
import json
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitfn import scaling, tree
from vitfn.archive import Archive, write_archive
from vitfn.errors import InputError, RunError
from vitfn.step import TrainState
from vitfn.tree import Tree

log = logging.getLogger("vitfn")


def _fields(state: TrainState) -> Tree:
    fields = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return fields | ({"scaling": state.scaling} if state.scaling else {})


def write(path: Path, fields: Tree, notes: dict[str, Any]) -> None:
    """The fields of a state, each array in its own dtype, and `notes`, which are JSON; each has a CRC."""
    text = torch.frombuffer(bytearray(json.dumps(notes).encode()), dtype=torch.uint8)
    write_archive(path, (tree.flatten(fields) | {"notes": text}).items(), exact=True)


def read(path: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state in a file, on the device of `like`, and its notes.

    Raises InputError for a file that is damaged, or that holds other leaves than `like`, or others in shape or dtype.
    """
    with Archive(path) as archive:
        wanted = tree.flatten(_fields(like))
        if any(name.startswith("scaling/") for name in archive.shapes) and not like.scaling:
            wanted |= tree.flatten({"scaling": scaling.init(like.step.device)})
        if others := sorted(archive.shapes.keys() ^ (wanted.keys() | {"notes"})):
            raise InputError(f"{path}: found the state of another model or optimizer: they differ in {others[0]}, ...")
        flat = {}
        for name, leaf in wanted.items():
            found = archive.read_exactly(name)
            if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
                found_is, leaf_is = (f"{tuple(x.shape)} of {str(x.dtype)[6:]}" for x in (found, leaf))
                raise InputError(f"{path}: {name}: found {found_is}, expected {leaf_is}")
            flat[name] = found.to(leaf.device)
        fields: Tree = {"opt_state": {}} | tree.unflatten(flat)  # an optimizer without state leaves no leaf
        return TrainState(**fields), json.loads(archive.read_exactly("notes").numpy().tobytes())


class Snapshots:
    """The snapshots of a run, `<folder>/step_<number>.npz`: at most `keep`, and one being written.

    Writing happens in threads, one after the other, on copies on the CPU, so that training goes on; a failure shows at
    the next call. Where `writes` is false nothing is written: another process does it.
    """

    def __init__(self, folder: Path, keep: int, writes: bool = True):
        self.folder, self._keep, self._writes = folder, keep, writes
        self._pending: list[_Writing] = []

    def files(self) -> list[Path]:
        """The snapshots that are there, the newest first."""
        found = (path for path in self.folder.glob("step_*.npz") if re.fullmatch(r"step_\d+", path.stem))
        return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)

    def latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest snapshot that can be read, and its notes; None where none are. Raises RunError if none can."""
        for path in (files := self.files()):
            try:
                return read(path, like)
            except InputError as error:
                log.warning("DAMAGED CHECKPOINT: %s", error)
        if files:
            found = f"{len(files)} checkpoints, none of which can be read"
            raise RunError(f"{self.folder}: found {found}; remove the run to start over")
        return None

    def save(self, state: TrainState, notes: dict[str, Any]) -> None:
        """Writes the state as it is now, in the background."""
        if not self._writes:
            return
        self.wait(1)
        path = self.folder / f"step_{int(state.step):08d}.npz"
        fields = on_cpu(_fields(state))
        notes = copy.deepcopy(notes)

        def write_and_prune() -> None:
            self.folder.mkdir(exist_ok=True)
            write(path, fields, notes)
            files = self.files()
            place = files.index(path)
            for old in files[:place] + files[place + self._keep :]:  # newer ones were damaged when the run went on
                old.unlink()

        self.submit(write_and_prune, f"the checkpoint of step {int(state.step)}")

    def submit(self, function: Callable[[], None], what: str) -> None:
        """Runs a function that writes a file, in the background, after those before it, of which at most one waits."""
        if not self._writes:
            return
        self.wait(1)

        def run() -> None:
            try:
                function()
            except OSError as error:
                kept = f"the checkpoint {files[0]} is intact" if (files := self.files()) else "there is none before it"
                reason = f"{what} could not be written ({error.strerror or error}); {kept}"
                raise RunError(f"{reason}: make room or give access, then --resume") from None

        self._pending.append(_Writing(run, self._pending[-1] if self._pending else None))
        self._pending[-1].start()

    def check(self) -> None:
        """Raises RunError if what was written in the meantime failed."""
        for writing in [writing for writing in self._pending if not writing.is_alive()]:
            self._pending.remove(writing)
            writing.result()

    def wait(self, pending: int = 0) -> None:
        """Until all but so many are written."""
        while len(self._pending) > pending:
            self._pending.pop(0).result()

    def close(self) -> None:
        """Until all is written, or has failed."""
        for writing in self._pending:
            writing.join()


class _Writing(threading.Thread):
    """A function in a thread of its own, after the one before has ended."""

    def __init__(self, function: Callable[[], None], before: "_Writing | None"):
        super().__init__(name="snapshots", daemon=True)  # daemon: who interrupts does not wait
        self._function, self._before = function, before
        self._error: BaseException | None = None

    def run(self) -> None:
        if self._before:
            self._before.join()
        try:
            self._function()
        except BaseException as error:  # shown by `result`
            self._error = error
        del self._function, self._before  # a copy of a state hangs on it

    def result(self) -> None:
        """Waits for the thread's very end, and raises what the function raised.

        A thread that is still ending when the interpreter does, in torch's C++, aborts the process.
        """
        self.join()
        if self._error:
            raise self._error


def on_cpu(leaves: Tree) -> Tree:
    """A copy that training does not touch."""
    return tree.map(lambda leaf: leaf.detach().to("cpu", copy=True), leaves)
