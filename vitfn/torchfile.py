"""Files that torch.save wrote, in both of its formats, read without unpickling.

A pickle is a program. This one is not run: its instructions are followed as far as dicts of tensors need them, any
other is refused, and nothing is called. That is stricter than torch.load(weights_only=True), which lets a file build
byte arrays of any size and tensors larger than their memory. An array's bytes are read when it is asked for.
"""

import io
import math
import mmap
import os
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from vitfn.archive import blaming, data_offset
from vitfn.errors import InputError

_LARGEST_PICKLE = 2 << 20  # bytes; a state dict's is some 50 KB
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before torch 1.6
# Training scripts keep the model's state dict beside the optimizer's under one of these names.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
_STORAGES = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}


class _Named(NamedTuple):
    """A class or function that a pickle names: 'module name'. It stays a name."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class _Strided(NamedTuple):
    """A tensor, as far as a pickle tells of it: a view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """From its first element to its last."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) if self.numel else 0


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, lazy: Any = None) -> _Strided:
    """torch._utils._rebuild_tensor_v2, without a tensor."""
    if lazy:
        raise ValueError("a tensor that is yet to be computed")
    numbers = (offset, *shape, *stride)
    tensor = _Strided(storage, offset, shape, stride)
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and 0 <= n < 2**40 for n in numbers):
        raise ValueError("a tensor of something else than numbers")
    if tensor.numel > storage.numel or offset + tensor.extent > storage.numel:
        raise ValueError(f"a tensor of shape {shape}, more than its memory holds")
    return tensor


def _storage(kind: Any, named: Any, key: Any, place: Any, numel: Any, view: Any = None) -> _Storage:
    if kind != "storage" or not isinstance(key, str) or not isinstance(numel, int) or view is not None:
        raise ValueError("a reference that torch.save does not write")
    return _Storage(key, _STORAGES[named.name], numel)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "collections OrderedDict": lambda: {},
}
# What lies beside tensors in the states of optimizers and schedules is not made.
for _name in ("Size", "device", "float16", "bfloat16", "float32", "float64", "int64"):
    _CALLS[f"torch {_name}"] = lambda *_: None
for _name in ("collections Counter", "__builtin__ set", "_codecs encode"):
    _CALLS[_name] = lambda *_: None
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_GIVEN = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING")
_MARK = object()


def follow(stream: IO[bytes]) -> Any:
    """What the pickle in a stream would be, with names for classes and descriptions for tensors."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        items = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def put(target: Any, pairs: list[Any]) -> None:
        named = zip(pairs[::2], pairs[1::2], strict=True)
        if not isinstance(target, dict):
            raise ValueError(f"{type(target).__name__} with items, expected a dict")
        target.update((key, item) for key, item in named if isinstance(key, (str, int)))  # no others name an array

    argument: Any
    for operation, argument, _ in pickletools.genops(stream):
        name = operation.name
        if name in _GIVEN:
            stack.append(argument)
        elif name in _LITERALS:
            stack.append(_LITERALS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(stack.pop() for _ in range(int(name[-1])))[::-1])
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            put(stack[-1], pairs)
        elif name == "GLOBAL":
            if argument not in _STORAGES and argument not in _CALLS:
                raise ValueError(f"{argument}, expected nothing but tensors")
            stack.append(_Named(argument))
        elif name == "BINPERSID":
            stack.append(_storage(*stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_CALLS[stack.pop().name](*arguments))
        elif name == "BUILD":
            stack.pop()  # a state dict's own attributes
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"the instruction {name}, expected nothing but tensors")
    raise ValueError("a pickle without an end")


class TorchFile:
    """What torch.save wrote: a state dict, or a dict that has one under a usual name (`wrapper`)."""

    kind = "torch"
    owned = False
    comment = b""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with blaming(self.path, "no state dict as torch.save writes it"), open(path, "rb") as file:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pickletools unescapes some texts, and warns of what is wrong in them
                content, self._places = _zipped(file) if zipfile.is_zipfile(file) else _legacy(file)
            wrapped = [
                name for name in _WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(name), dict)
            ]
            self.wrapper = wrapped[0] if wrapped else None
            content = content[self.wrapper] if self.wrapper else content
            if not isinstance(content, dict):
                kind = "Tensor" if isinstance(content, _Strided) else type(content).__name__
                raise InputError(f"{self.path}: expected a state dict, found {kind}")
            self._tensors = {
                name: leaf for name, leaf in content.items() if isinstance(leaf, _Strided) and isinstance(name, str)
            }
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
        content = follow(io.BytesIO(archive.read(pickled)))
        places = {}
        for info in members:
            if info.filename.startswith(f"{root}data/"):
                places[info.filename.removeprefix(f"{root}data/")] = (data_offset(file, info), info.file_size)
        return content, places


def _legacy(file: IO[bytes]) -> tuple[Any, _Places]:
    """Five pickles (magic number, version, platform, the object, the storages' keys), then each storage."""
    file.seek(0)
    stream = io.BytesIO(file.read(_LARGEST_PICKLE))
    magic, _, platform, content, keys = (follow(stream) for _ in range(5))
    if magic != _LEGACY_MAGIC or not platform["little_endian"]:
        raise ValueError("no magic number, or numbers of another byte order")
    dtypes: dict[str, torch.dtype] = {}
    todo, seen = [content], set()
    while todo:  # the storages are described where the tensors are
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, _Strided):
            dtypes[item.storage.key] = item.storage.dtype
        elif isinstance(item, (dict, list, tuple)):
            todo += item.values() if isinstance(item, dict) else item
    places, place = {}, stream.tell()
    for key in keys:
        if not isinstance(key, str):
            raise ValueError("a storage without a name")
        file.seek(place)
        (numel,) = struct.unpack("<q", file.read(8))
        size = numel * dtypes[key].itemsize
        if not 0 <= size <= os.fstat(file.fileno()).st_size:
            raise ValueError(f"a storage of {numel} numbers")
        places[key] = (place + 8, size)
        place += 8 + size
    return content, places
