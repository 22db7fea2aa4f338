"""Archives of arrays (.npz): read straight into memory that each tensor owns, written atomically."""

import contextlib
import math
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from vitfn.errors import InputError
from vitfn.files import replacing

_CHUNK = 1 << 20  # bytes; small enough to be checksummed and copied while in the cache
_LARGEST_EXPANSION = 64 << 20, 16  # an archive holds at most so many bytes, plus so many times its own size
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@contextlib.contextmanager
def blaming(what: str, found: str = "damaged, or not an array of numbers") -> Iterator[None]:
    """Whatever goes wrong with foreign bytes becomes one line that says where."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{what}: {found} ({reason})") from None


def data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin in its archive: behind its own header, name and extra field."""
    file.seek(info.header_offset + 26)
    return info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


class _Stored:
    """An uncompressed member, read into given memory without a copy between; checked as zipfile checks it."""

    def __init__(self, path: str, info: zipfile.ZipInfo):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115, closed on leaving the context
        self._file.seek(data_offset(self._file, info))
        self._info, self._crc, self._done = info, 0, 0

    def __enter__(self) -> "_Stored":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def read(self, count: int) -> bytes:
        buffer = bytearray(count)
        return bytes(buffer[: self.readinto(memoryview(buffer))])

    def readinto(self, memory: memoryview) -> int:
        memory = memory[: self._info.file_size - self._done]
        count = self._file.readinto(memory) or 0
        self._crc, self._done = zlib.crc32(memory[:count], self._crc), self._done + count
        if self._done == self._info.file_size and self._crc != self._info.CRC:
            raise zipfile.BadZipFile("bad CRC-32")
        return count

    def tell(self) -> int:
        return self._done


class _Header(NamedTuple):
    """What a member's npy header says, and how many bytes it has.

    It is parsed once, in one thread: numpy does it with ast, which on Python 3.11 can raise SystemError where several
    threads parse at once ("AST constructor recursion depth mismatch", CPython issue 106905, seen on 3.11.7).
    """

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    size: int


class _Handles:
    """One ZIP archive, opened once by each thread that reads it.

    Threads that open members of the same ZipFile find sound ones damaged, at random, on Python 3.12.0 to 3.12.8, 3.13.0
    and 3.13.1 (CPython issue 127847).
    """

    def __init__(self, path: str):
        self._path, self._thread, self._all = path, threading.local(), list[zipfile.ZipFile]()

    @property
    def own(self) -> zipfile.ZipFile:
        """This thread's."""
        if not hasattr(self._thread, "handle"):
            self._thread.handle = zipfile.ZipFile(self._path)
            self._all.append(self._thread.handle)
        return self._thread.handle

    def close(self) -> None:
        for handle in self._all:
            handle.close()


class Archive:
    """An npz file open for reading: `shapes` and `dtypes` by array name, the archive's `comment`, arrays on demand.

    Raises InputError for what is not such a file; object arrays, which could run code, are never opened.
    """

    kind = "npz"
    owned = True

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        try:
            self._zip = _Handles(self.path)
            members, self.comment = self._zip.own.infolist(), self._zip.own.comment
        except OSError as error:
            raise InputError(f"{path}: expected a file of weights, found: {error.strerror or error}") from None
        except Exception:  # zipfile has several for what is not a ZIP archive
            raise InputError(f"{path}: expected a file of weights, found {what_is(self.path)}") from None
        try:
            self._read_headers(members)
        except BaseException:
            self._zip.close()
            raise

    def _read_headers(self, members: list[zipfile.ZipInfo]) -> None:
        self._check_directory(members)
        self._members = {info.filename.removesuffix(".npy"): info for info in members}
        self._headers: dict[str, _Header] = {}
        for name, info in self._members.items():
            with blaming(f"{self.path}: {name}"), self._zip.own.open(info) as file:
                shape, fortran_order, dtype = _HEADERS[npy.read_magic(file)](file)
                expected, found = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
                if expected != found and not dtype.hasobject:
                    raise InputError(f"{self.path}: {name}: found {found:,} bytes, expected {expected:,} for {shape}")
                self._headers[name] = _Header(shape, fortran_order, dtype, file.tell())
        self.shapes = {name: header.shape for name, header in self._headers.items()}
        self.dtypes = {name: _dtype_name(header.dtype) for name, header in self._headers.items()}

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def _check_directory(self, members: list[zipfile.ZipInfo]) -> None:
        """Refuses what zipfile reads over: lost entries, a comment that is cut off, members under damaged names."""
        with open(self.path, "rb") as file:
            file.seek(-len(self.comment) - 12, os.SEEK_END)
            entries, _, _, length = struct.unpack("<HIIH", file.read(12))
        if entries != len(members) or length != len(self.comment):
            raise InputError(f"{self.path}: expected a file of weights, found {what_is(self.path)}")
        if not members:
            raise InputError(f"{self.path}: expected a file of weights, found a ZIP archive without arrays")
        for info in members:
            if not info.filename.endswith(".npy"):
                raise InputError(f"{self.path}: found a member {info.filename}, expected .npy arrays only")
        slack, factor = _LARGEST_EXPANSION
        size, found = os.path.getsize(self.path), sum(info.file_size for info in members)
        if found > slack + factor * size:
            raise InputError(f"{self.path}: found {found:,} bytes of arrays packed into {size:,}, which no weights are")

    def _open(self, name: str) -> Any:
        """The member as a file with readinto, behind its header."""
        info = self._members[name]
        file: Any = self._zip.own.open(info)  # compares the member's own header with the directory
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size:
            file.close()
            file = _Stored(self.path, info)
        if len(file.read(size := self._headers[name].size)) != size:
            raise EOFError("the data end early")
        return file

    def read(self, name: str, parts: int = 1) -> list[Tensor]:
        """One array as float32 tensors on the CPU, equal parts of its first axis; its CRC is checked on the way."""
        with blaming(f"{self.path}: {name}"), self._open(name) as file:
            shape, fortran_order, dtype, _ = self._headers[name]
            if self.dtypes[name] not in _FLOATS:
                raise InputError(
                    f"{self.path}: {name}: found an array of {self.dtypes[name]}, expected floating-point numbers"
                )
            if fortran_order:
                (leaf,) = self._fill(file, [torch.empty(shape[::-1])], dtype)
                whole = leaf.permute(*range(leaf.ndim)[::-1])
                return [part.clone(memory_format=torch.contiguous_format) for part in whole.chunk(parts)]
            lengths = (shape[0] // parts, *shape[1:]) if shape else shape
            return self._fill(file, [torch.empty(lengths) for _ in range(parts)], dtype)

    def read_exactly(self, name: str) -> Tensor:
        """One array in the dtype that `write_archive(..., exact=True)` wrote it in; its CRC is checked on the way."""
        with blaming(f"{self.path}: {name}"), self._open(name) as file:
            shape, fortran_order, *_ = self._headers[name]
            if fortran_order or self.dtypes[name] not in _EXACT:
                raise InputError(f"{self.path}: {name}: found an array of {self.dtypes[name]}, expected one of ours")
            leaf = torch.empty(shape, dtype=_EXACT[self.dtypes[name]])
            _read_into(file, leaf.reshape(-1).view(torch.uint8).numpy().data)
            return leaf

    def _fill(self, file, leaves: list[Tensor], dtype: np.dtype) -> list[Tensor]:
        """The leaves, filled one after the other from the member's bytes; at a member's end its CRC is compared."""
        for leaf in leaves:
            array = leaf.numpy() if dtype == np.float32 else np.empty(leaf.shape, dtype)
            _read_into(file, array.reshape(-1).view(np.uint8).data)
            if dtype.kind == "V":
                leaf.copy_(torch.from_numpy(array.view(np.int16)).view(torch.bfloat16))
            elif dtype != np.float32:
                with np.errstate(all="ignore"):  # what float32 cannot hold is infinite
                    leaf.numpy()[...] = array
        return leaves


_FLOATS = ("float16", "bfloat16", "float32", "float64")
_EXACT = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8}


def _read_into(file, memory: memoryview) -> None:
    done = 0
    while done < memory.nbytes:
        if not (count := file.readinto(memory[done : done + _CHUNK])):
            raise EOFError("the data end early")
        done += count


def _dtype_name(dtype: np.dtype) -> str:
    """The dtype's name; numpy stores bfloat16, which it does not know, as raw bytes."""
    if dtype.hasobject:
        return "Python objects"
    return "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 and not dtype.names else dtype.name


def what_is(path: str | os.PathLike) -> str:
    """What a file that holds no weights looks like, and what to do."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer; fetch the file itself with 'git lfs pull'"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, as a failed download leaves it; download the file again"
    size = f"{os.path.getsize(path):,} bytes"
    return (
        f"a ZIP archive cut off after {size}; copy it again"
        if start.startswith(b"pk")
        else f"{size} that are no ZIP archive"
    )


def write_archive(
    path: str | os.PathLike, arrays: Iterable[tuple[str, Tensor]], comment: bytes = b"", *, exact: bool = False
) -> None:
    """The arrays as np.savez writes them, with the same bytes every time; whole or not at all.

    In float32, or `exact`, in their own dtype, for `Archive.read_exactly`; numpy knows bfloat16 as two raw bytes.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = comment
        for name, leaf in arrays:
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                leaf = leaf.detach().to("cpu", leaf.dtype if exact else torch.float32).contiguous()
                array = leaf.view(torch.int16).numpy().view("V2") if leaf.dtype == torch.bfloat16 else leaf.numpy()
                npy.write_array(member, array, version=(1, 0), allow_pickle=False)
