"""A training state on disk: written whole in the background, verified when it is read, the last few kept."""

import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
    """The fields of a state, each array in its own dtype and with a CRC, and the notes as the archive's comment."""
    write_archive(path, tree.flatten(fields).items(), json.dumps(notes).encode(), exact=True)


def read(path: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state in a file, on the device of `like`, and its notes.

    Raises InputError for a file that is damaged, or that holds other leaves than `like`, or others in shape or dtype.
    """
    with Archive(path) as archive:
        wanted = tree.flatten(_fields(like))
        if any(name.startswith("scaling/") for name in archive.shapes) and not like.scaling:
            wanted |= tree.flatten({"scaling": scaling.init(like.step.device)})
        if archive.shapes.keys() != wanted.keys():
            raise InputError(f"{path}: found the state of another model or optimizer")
        flat = {}
        for name, leaf in wanted.items():
            found = archive.read_exactly(name)
            if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
                raise InputError(f"{path}: {name}: found {tuple(found.shape)}, expected {tuple(leaf.shape)}")
            flat[name] = found.to(leaf.device)
        try:
            return TrainState(**tree.unflatten(flat)), json.loads(archive.comment)
        except ValueError:
            raise InputError(f"{path}: found notes that are not JSON") from None


class Snapshots:
    """The snapshots of a run, `<folder>/step_<number>.npz`: at most `keep`, and one being written.

    Writing happens in a thread, on copies on the CPU, so that training goes on; a failure shows at the next call.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "snapshots")
        self._pending: list[Future] = []

    def files(self) -> list[Path]:
        """The snapshots that are there, the newest first."""
        found = (path for path in self.folder.glob("step_*.npz") if re.fullmatch(r"step_\d+", path.stem))
        return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)

    def latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole snapshot and its notes; None where there is none. Raises RunError if all are damaged."""
        for path in (files := self.files()):
            try:
                return read(path, like)
            except InputError as error:
                log.warning("DAMAGED CHECKPOINT: %s", error)
        if files:
            raise RunError(f"{self.folder}: found {len(files)} checkpoints, all damaged; remove the run to start over")
        return None

    def save(self, state: TrainState, notes: dict[str, Any]) -> None:
        """Writes the state, in the background; waits for the one before."""
        path = self.folder / f"step_{int(state.step):08d}.npz"
        fields = tree.map(lambda leaf: leaf.detach().to("cpu", copy=True), _fields(state))

        def write_and_prune() -> None:
            self.folder.mkdir(exist_ok=True)
            write(path, fields, notes)
            for old in self.files()[self._keep :]:
                old.unlink()

        self.submit(write_and_prune, f"the checkpoint of step {int(state.step)}")

    def submit(self, function: Callable[[], None], what: str) -> None:
        """Runs a function that writes a file in the thread, after what it has to do already; at most two wait there."""
        while len(self._pending) > 1:
            self._pending.pop(0).result()

        def run() -> None:
            try:
                function()
            except OSError as error:
                kept = self.files()
                rest = (
                    f"the checkpoint {kept[0]} is intact: make room, then go on with --resume" if kept else "none was"
                )
                raise RunError(f"{what} could not be written ({error}); {rest}") from None

        self._pending.append(self._thread.submit(run))

    def check(self) -> None:
        """Raises RunError if what was written in the meantime failed."""
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()

    def wait(self) -> None:
        """Until all is written."""
        while self._pending:
            self._pending.pop(0).result()

    def close(self) -> None:
        self._thread.shutdown()


def on_cpu(params: Tree) -> Tree:
    """A copy that training does not touch."""
    return tree.map(lambda leaf: leaf.detach().to("cpu", torch.float32, copy=True), params)
