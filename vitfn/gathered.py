"""A training checkpoint as a file of weights: the model's leaves, averaged where the optimizer keeps an average."""

import json
from typing import Any

from torch import Tensor

from vitfn.archive import Archive, blaming
from vitfn.sharded import Directory


def is_checkpoint(archive: Archive) -> bool:
    """Whether an npz file is one that vitfn.snapshot wrote."""
    return archive.dtypes.get("step") == "int64" and archive.dtypes.get("notes") == "uint8"


class Gathered:
    """A checkpoint, a directory or an npz file, as vitfn.containers opens files: `params/...` and nothing else.

    Leaves are read one at a time, of a directory from the shares of all processes. What `optim.averaged` would
    evaluate is what is read. Its notes tell the config and the class names.
    """

    owned = True

    def __init__(self, file: Archive | Directory):
        self._file, self.path, self.kind = file, file.path, f"{file.kind} checkpoint"
        with blaming(self.path, "no notes of a checkpoint"):
            notes = file.notes if isinstance(file, Directory) else _notes(file)
            self.comment = json.dumps({"vitfn": notes["model"]}).encode() if "model" in notes else b""
        self._names = {
            name: average if (average := name.replace("params", "opt_state/ema", 1)) in file.shapes else name
            for name in file.shapes
            if name.startswith("params/")
        }
        self.shapes = {name: file.shapes[name] for name in self._names}
        self.dtypes = {name: file.dtypes[name] for name in self._names}

    def read(self, name: str, parts: int = 1) -> list[Tensor]:
        return self._file.read(self._names[name], parts)

    def __enter__(self) -> "Gathered":
        return self

    def __exit__(self, *error) -> None:
        self._file.__exit__(*error)


def _notes(archive: Archive) -> dict[str, Any]:
    return json.loads(archive.read_exactly("notes").numpy().tobytes())
