"""A training state on disk: written whole in the background, verified when it is read, the last few kept.

A state of plain tensors is one npz file, which one process writes; of one that is sharded over processes, each writes
its share to a directory (vitfn.sharded). Either is read into a state of either kind.
"""

import copy
import dataclasses
import json
import logging
import re
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfn import scaling, sharded, tree
from vitfn.archive import Archive, write_archive
from vitfn.errors import InputError, RunError
from vitfn.meshes import is_cut
from vitfn.parallel import ALONE, Ranks
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
    """The state in a file or a directory, on the device of `like`, and its notes.

    DTensors, and all leaves that a directory has, are read into the memory of `like`, which the new state takes over.
    Raises InputError for what is damaged, or that holds other leaves than `like`, or others in shape or dtype.
    """
    return _read(_verified(path), like)


def _verified(path: Path, ranks: Ranks = ALONE) -> Path:
    """The path, of whose files this process's part is whole; those of npz files are compared as they are read."""
    if path.is_dir():
        sharded.Directory(path).verify(ranks.rank, ranks.count)
    return path


def _read(path: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    if path.is_dir():
        directory = sharded.Directory(path)
        leaves = _wanted(path, directory.shapes, like)
        for name, leaf in leaves.items():
            _compare(f"{path}: {name}", directory.shapes[name], directory.dtype(name), leaf)
        directory.fill(leaves)
        return _state(leaves), directory.notes
    with Archive(path) as archive:
        leaves = _wanted(path, archive.shapes.keys() - {"notes"}, like)
        for name, leaf in leaves.items():
            found = archive.read_exactly(name)
            _compare(f"{path}: {name}", found.shape, found.dtype, leaf)
            leaves[name] = _placed(found, leaf)
        return _state(leaves), json.loads(archive.read_exactly("notes").numpy().tobytes())


def _wanted(path: Path, names: Collection[str], like: TrainState) -> dict[str, Tensor]:
    """The leaves of `like` by name, and the loss scale if the file has one; InputError if its names are others."""
    wanted = tree.flatten(_fields(like))
    if any(name.startswith("scaling/") for name in names) and not like.scaling:
        wanted |= tree.flatten({"scaling": scaling.init(like.step.device)})
    if others := sorted(set(names) ^ wanted.keys()):
        raise InputError(f"{path}: found the state of another model or optimizer: they differ in {others[0]}, ...")
    return wanted


def _compare(what: str, shape: tuple[int, ...], dtype: torch.dtype, leaf: Tensor) -> None:
    if (shape, dtype) != (leaf.shape, leaf.dtype):
        found, expected = (f"{tuple(s)} of {str(d)[6:]}" for s, d in ((shape, dtype), (leaf.shape, leaf.dtype)))
        raise InputError(f"{what}: found {found}, expected {expected}")


def _placed(found: Tensor, leaf: Any) -> Tensor:
    """A whole leaf on the device of another, or this process's share in the memory of a DTensor."""
    if not is_cut(leaf):
        return found.to(leaf.device)
    from torch.distributed.tensor import distribute_tensor

    share = distribute_tensor(found, leaf.device_mesh, leaf.placements, src_data_rank=None)  # cut off by each process
    leaf.detach().to_local().copy_(share.to_local())
    return leaf


def _state(leaves: dict[str, Tensor]) -> TrainState:
    fields: Tree = {"opt_state": {}} | tree.unflatten(leaves)  # an optimizer without state leaves no leaf
    return TrainState(**fields)


def _number(path: Path) -> int:
    """The step in a snapshot's name."""
    return int(path.stem.removeprefix("step_"))


class Snapshots:
    """The snapshots of a run, `<folder>/step_<number>.npz` or `/step_<number>/`: at most `keep`, and one being written.

    Writing happens in threads, one after the other, on copies on the CPU, so that training goes on; a failure shows at
    the next call. Of several `ranks` the first writes files, and all together directories.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks = ALONE):
        self.folder, self._keep, self._ranks = folder, keep, ranks
        self._pending: list[_Writing] = []

    def files(self) -> list[Path]:
        """The snapshots that are there and complete, the newest first."""
        whole = (path for path in self.folder.glob("step_*") if path.suffix == ".npz" or sharded.is_complete(path))
        found = (path for path in whole if re.fullmatch(r"step_\d+", path.stem))
        return sorted(found, key=_number, reverse=True)

    def clean(self) -> None:
        """Removes the directories that a writer which was killed left incomplete."""
        for path in self.folder.glob("step_*"):
            if path.is_dir() and re.fullmatch(r"step_\d+", path.name) and not sharded.is_complete(path):
                sharded.remove(path)

    def latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest snapshot that all processes can read, and its notes; None where none are.

        The memory of `like` may be taken over, as `read` does. Raises RunError if none can be read.
        """
        files, *others = self._ranks.gather(self.files())
        if any(found != files for found in others):
            found = ", ".join(str(paths[0]) if paths else "none" for paths in (files, *others))
            raise RunError(f"{self.folder}: the processes found {found}; expected a folder that all of them share")
        for path in files:
            if self._agreed(_verified, path, self._ranks) and (state := self._agreed(_read, path, like)):
                return state
        if files:
            found = f"{len(files)} checkpoints, none of which can be read"
            raise RunError(f"{self.folder}: found {found}; remove the run to start over")
        return None

    def _agreed(self, function: Callable, *arguments: Any) -> Any:
        """What the function returns, or in all processes None if it raised InputError in one: then the log says so."""
        found = problem = None
        try:
            found = function(*arguments)
        except InputError as error:
            problem = str(error)
        if problems := [line for line in self._ranks.gather(problem) if line]:
            log.warning("DAMAGED CHECKPOINT: %s", problems[0])
            return None
        return found

    def save(self, state: TrainState, notes: dict[str, Any]) -> None:
        """Writes the state as it is now, in the background; all processes call it."""
        together = any(is_cut(leaf) for leaf in tree.leaves(_fields(state)))
        if not (together or self._ranks.first):
            return
        self.wait(0 if together else 1)  # of a state that fills the machines there is room for one copy
        step = int(state.step)
        fields, notes = on_cpu(_fields(state)), copy.deepcopy(notes)

        def write_file() -> None:
            path = self.folder / f"step_{step:08d}.npz"
            self.folder.mkdir(exist_ok=True)
            write(path, fields, notes)
            self._prune(path)

        def write_directory() -> None:
            path = self.folder / f"step_{step:08d}"
            ranks = dataclasses.replace(self._ranks, host=self._ranks.saving, watch=None)  # which is the training's
            sharded.write(path, tree.flatten(fields), notes, ranks)
            sharded.together(ranks, lambda: self._prune(path) if ranks.first else None)

        self._begin(write_directory if together else write_file, f"the checkpoint of step {step}")

    def _prune(self, path: Path) -> None:
        """Keeps `path` and the last before it; newer ones were damaged when the run went on."""
        others = [other for other in self.files() if other != path]
        newer = [other for other in others if _number(other) >= _number(path)]
        for old in newer + others[len(newer) :][self._keep - 1 :]:
            sharded.remove(old) if old.is_dir() else old.unlink()

    def submit(self, function: Callable[[], None], what: str) -> None:
        """Runs a function that writes a file, in the background, after those before it, of which at most one waits."""
        if self._ranks.first:
            self.wait(1)
            self._begin(function, what)

    def _begin(self, function: Callable[[], None], what: str) -> None:
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
