"""Files of named arrays in every format: npz, safetensors, and what torch.save writes, behind one interface.

An open file has `path`, `kind`, `shapes` and `dtypes` by array name, `comment` (bytes: vitfn's own description, if it
holds one), and `read(name, parts)`: tensors on the CPU, equal parts of the array's first axis. Where `owned`, these are
float32 in memory of their own; otherwise views of the file, or of what was read of it.
"""

import json
import os
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vitfn.archive import Archive, blaming, what_is, write_archive
from vitfn.errors import InputError
from vitfn.files import replacing
from vitfn.gathered import Gathered, is_checkpoint
from vitfn.sharded import Directory, is_complete
from vitfn.torchfile import TorchFile

FORMATS = ("npz", "safetensors")  # those that can be written
RUN_FILES = ("model.npz", "best.npz")  # a run's weights, the ones to take first
_HUB_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class File(Protocol):
    path: str
    kind: str
    owned: bool
    comment: bytes
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str, parts: int = 1) -> list[Tensor]: ...
    def __enter__(self) -> "File": ...
    def __exit__(self, *_) -> None: ...


def located(path: str | os.PathLike) -> str:
    """The file of weights in a folder, a run's or one of the hub's; any other path as it is."""
    if not os.path.isdir(path) or is_complete(path):
        return os.fspath(path)
    for name in (*RUN_FILES, *_HUB_FILES):
        if os.path.exists(found := os.path.join(path, name)):
            return found
    expected = ", ".join((*RUN_FILES, *_HUB_FILES))
    raise InputError(f"{path}: found a folder without weights, expected a file of weights or one of {expected} in it")


def open_file(path: str | os.PathLike) -> File:
    """The file opened by its content, whatever its name. Raises InputError for what holds no arrays."""
    if is_complete(path):
        directory = Directory(path)
        directory.verify()
        return Gathered(directory)
    path = located(path)
    if path.endswith(".index.json"):
        return Shards(path)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if start.startswith(b"PK") and not _is_torch_archive(path):
            archive = Archive(path)
            return Gathered(archive) if is_checkpoint(archive) else archive
        if start[8:9] == b"{":
            return Safetensors(path)
        if start.startswith((b"PK", b"\x80")):
            return TorchFile(path)
    except OSError as error:
        raise InputError(f"{path}: expected a file of weights, found: {error.strerror or error}") from None
    raise InputError(f"{path}: expected a file of weights (npz, safetensors or torch's), found {what_is(path)}")


def _is_torch_archive(path: str | os.PathLike) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # damaged: for Archive to say how
        return False


class Safetensors:
    """A safetensors file. It is opened anew for each array, so that what was read leaves the memory."""

    kind = "safetensors"
    owned = False

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with blaming(self.path, "no safetensors file"), self._open() as file:
            self.comment = (file.metadata() or {}).get("vitfn", "").encode()
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.dtypes = {name: _DTYPES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()}

    def _open(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path, framework="pt")

    def __enter__(self) -> "Safetensors":
        return self

    def __exit__(self, *_) -> None:
        pass

    def read(self, name: str, parts: int = 1) -> list[Tensor]:
        with blaming(f"{self.path}: {name}"), self._open() as file:
            return _parts(file.get_tensor(name), parts, f"{self.path}: {name}")


_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def _parts(leaf: Tensor, parts: int, what: str) -> list[Tensor]:
    if not leaf.is_floating_point():
        raise InputError(f"{what}: found an array of {leaf.dtype}, expected floating-point numbers")
    return list(leaf.detach().chunk(parts)) if parts > 1 else [leaf.detach()]


class Shards:
    """Weights in several files, of which the index, `*.index.json`, says which has which array."""

    kind = "sharded"
    owned = False
    comment = b""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with blaming(self.path, "no index of sharded weights"), open(path, "rb") as file:
            where = json.load(file)["weight_map"]
            if outside := [name for name in where.values() if Path(name).name != name]:
                raise ValueError(f"{outside[0]} is no file's name")
            files = {name: open_file(Path(path).with_name(name)) for name in sorted(set(where.values()))}
            self._files = {array: files[name] for array, name in where.items()}
            self.shapes = {array: file.shapes[array] for array, file in self._files.items()}
            self.dtypes = {array: file.dtypes[array] for array, file in self._files.items()}

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error) -> None:
        for file in set(self._files.values()):
            file.__exit__(*error)

    def read(self, name: str, parts: int = 1) -> list[Tensor]:
        return self._files[name].read(name, parts)


def write_file(path: str | os.PathLike, arrays: Iterable[tuple[str, Tensor]], comment: bytes = b"") -> None:
    """The arrays in float32 in the format that the path's suffix names; whole or not at all."""
    suffix = os.path.splitext(path)[1][1:]
    if suffix == "npz":
        return write_archive(path, arrays, comment)
    if suffix != "safetensors":
        raise InputError(f"{path}: found the suffix {suffix or 'none'}, expected one of {', '.join(FORMATS)}")
    # safetensors' own save_file writes metadata in random order and needs all arrays in memory of their own at once.
    tensors = {name: leaf.detach().to("cpu", torch.float32) for name, leaf in arrays}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    if comment:
        header["__metadata__"]["vitfn"] = comment.decode()
    place = 0
    for name, leaf in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(leaf.shape), "data_offsets": [place, place + leaf.nbytes]}
        place += leaf.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for leaf in tensors.values():
            file.write(leaf.contiguous().numpy().data)
