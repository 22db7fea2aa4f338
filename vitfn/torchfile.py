"""Files that torch.save wrote, in both of its formats. Nothing in them is unpickled (vitfn.pickles).

An array's bytes are read when it is asked for.
"""

import io
import mmap
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor

from vitfn.archive import blaming, data_offset
from vitfn.errors import InputError
from vitfn.pickles import Follower, Object, Strided

_LARGEST_PICKLE = 4 << 20  # bytes; a state dict's is some 50 KB, with an optimizer's state some 200
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before torch 1.6
_DEEPEST = 4  # dicts in dicts, in which a training script may keep its model


def _named(content: dict[Any, Any]) -> Iterator[tuple[str, Strided]]:
    """The tensors in dicts by name, of dicts in them behind the key and a slash: 'model/cls_token'. Each dict once."""
    seen, todo = {id(content)}, [("", content)]
    for prefix, several in todo:
        for key, item in several.items():
            if isinstance(item, Strided):
                yield f"{prefix}{key}", item
            elif isinstance(item, dict) and id(item) not in seen and prefix.count("/") < _DEEPEST:
                seen.add(id(item))
                todo.append((f"{prefix}{key}/", item))


def _kind(item: Any) -> str:
    if isinstance(item, Object):
        return ".".join(item.name.split())
    return "Tensor" if isinstance(item, Strided) else type(item).__name__


class TorchFile:
    """What torch.save wrote: a state dict, or dicts of them and of other things, as training scripts leave them.

    An array's name has the keys of the dicts around its state dict before it: 'model/cls_token'.
    """

    kind = "torch"
    owned = False
    comment = b""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with blaming(self.path, "no state dict as torch.save writes it"), open(path, "rb") as file:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pickletools unescapes some texts, and warns of what is wrong in them
                content, self._places = _zipped(file) if zipfile.is_zipfile(file) else _legacy(file)
            if isinstance(content, Object):
                found = f"found an object of the class {_kind(content)}"
                expected = "expected a state dict: save the object's state_dict() in the program that made it"
                raise InputError(f"{self.path}: {found}, {expected}")
            if not isinstance(content, dict):
                raise InputError(f"{self.path}: expected a state dict, found {_kind(content)}")
            self._tensors = dict(_named(content))
            if not self._tensors:
                kinds = (f"{key} ({_kind(item)})" for key, item in list(content.items())[:5])
                found = f"found a dict of {', '.join(kinds) or 'nothing'} without arrays"
                raise InputError(f"{self.path}: expected a state dict, {found}")
            if sum(leaf.numel for leaf in self._tensors.values()) > 2 * os.path.getsize(path):
                raise ValueError("more numbers than the file has bytes for")
        self.shapes = {name: leaf.shape for name, leaf in self._tensors.items()}
        self.dtypes = {name: str(leaf.storage.dtype).removeprefix("torch.") for name, leaf in self._tensors.items()}

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_) -> None:
        pass

    def read(self, name: str, parts: int = 1) -> list[Tensor]:
        leaf = self._tensors[name]
        dtype = leaf.storage.dtype
        if not dtype.is_floating_point:
            raise InputError(
                f"{self.path}: {name}: found an array of {self.dtypes[name]}, expected floating-point numbers"
            )
        with blaming(f"{self.path}: {name}"), open(self.path, "rb") as file:
            place, size = self._places[leaf.storage.key]
            if size != leaf.storage.numel * dtype.itemsize:
                raise ValueError(f"{size} bytes, expected {leaf.storage.numel} numbers of {dtype.itemsize} bytes")
            file.seek(place + leaf.offset * dtype.itemsize)
            # An anonymous mapping leaves the memory when the leaf is made; a freed block of the heap may stay.
            buffer = mmap.mmap(-1, max(leaf.extent, 1) * dtype.itemsize)
            if leaf.extent and file.readinto(buffer) != len(buffer):
                raise EOFError("the data end early")
            view = torch.frombuffer(buffer, dtype=dtype).as_strided(leaf.shape, leaf.stride)
            return list(view.chunk(parts)) if parts > 1 else [view]


_Places = dict[str, tuple[int, int]]  # storage key -> place in the file and size, in bytes


def _zipped(file: IO[bytes]) -> tuple[Any, _Places]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        (pickled,) = (info for info in members if info.filename.endswith("/data.pkl"))
        if any(info.compress_type != zipfile.ZIP_STORED for info in members):
            raise ValueError("a compressed archive, which torch.save does not write")
        if pickled.file_size > _LARGEST_PICKLE:
            raise ValueError(f"a pickle of {pickled.file_size:,} bytes")
        root = pickled.filename.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("numbers of another byte order")
        content = Follower().follow(io.BytesIO(archive.read(pickled)))
        places = {}
        for info in members:
            if info.filename.startswith(f"{root}data/"):
                places[info.filename.removeprefix(f"{root}data/")] = (data_offset(file, info), info.file_size)
        return content, places


def _legacy(file: IO[bytes]) -> tuple[Any, _Places]:
    """Five pickles (magic number, version, platform, the object, the storages' keys), then each storage."""
    file.seek(0)
    stream = io.BytesIO(file.read(_LARGEST_PICKLE))
    follower = Follower()
    magic, _, platform, content, keys = (follower.follow(stream) for _ in range(5))
    if magic != _LEGACY_MAGIC or not platform["little_endian"]:
        raise ValueError("no magic number, or numbers of another byte order")
    places, place = {}, stream.tell()
    for key in keys:
        if not isinstance(key, str) or key not in follower.dtypes:  # others may take for ever to hash
            raise ValueError("a storage without a name, or of another kind of numbers")
        file.seek(place)
        (numel,) = struct.unpack("<q", file.read(8))
        size = numel * follower.dtypes[key].itemsize
        if not 0 <= size <= os.fstat(file.fileno()).st_size:
            raise ValueError(f"a storage of {numel} numbers")
        places[key] = (place + 8, size)
        place += 8 + size
    return content, places
