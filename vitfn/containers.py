"""Files of named arrays in every format: npz, safetensors, and what torch.save writes, behind one interface.

An open file has `path`, `kind`, `shapes` and `dtypes` by array name, `comment` (bytes: vitfn's own description, if it
holds one), and `read(name, parts)`: tensors on the CPU, equal parts of the array's first axis. Where `owned`, these are
float32 in memory of their own; otherwise views of the file, or of what was read of it.
"""

import os
import pickletools
import zipfile
from collections.abc import Iterable, Mapping
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from vitfn.archive import Archive, blaming, what_is, write_archive
from vitfn.errors import InputError
from vitfn.files import replacing

FORMATS = ("npz", "safetensors")  # those that can be written


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


def open_file(path: str | os.PathLike) -> File:
    """The file opened by its content, whatever its name. Raises InputError for what holds no arrays."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if start.startswith(b"PK") and not _is_torch_archive(path):
            return Archive(path)
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

# What a checkpoint's pickle may name. torch.load(weights_only=True) allows more, byte arrays of any size among it.
_NAMED = {
    *("collections OrderedDict", "collections Counter", "builtins set", "_codecs encode"),
    *(f"torch._utils {name}" for name in ("_rebuild_tensor_v2", "_rebuild_parameter")),
    *("torch Size", "torch device", "torch.serialization _get_layout", "torch.nn.parameter Parameter"),
    *(
        f"torch {kind}Storage"
        for kind in ("Half", "BFloat16", "Float", "Double", "Long", "Int", "Short", "Char", "Byte")
    ),
    *("torch BoolStorage", "torch.storage UntypedStorage"),
    *(f"torch {dtype}" for dtype in ("float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool")),
}
# Training scripts keep the model's state dict beside the optimizer's under one of these names.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")


class TorchFile:
    """What torch.save wrote: a state dict, or a dict that has one under a usual name. Nothing in it is executed.

    It is read whole, and each array leaves it when it is read.
    """

    kind = "torch"
    owned = False
    comment = b""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with blaming(self.path, "no file that torch.load reads with weights_only=True"):
            self._check()
            content = torch.load(path, map_location="cpu", weights_only=True)
        self.wrapper = next((name for name in _WRAPPERS if isinstance(_get(content, name), Mapping)), None)
        content = _get(content, self.wrapper) if self.wrapper else content
        if not isinstance(content, Mapping):
            raise InputError(f"{self.path}: expected a state dict, found {type(content).__name__}")
        self._tensors = {
            str(name): leaf for name, leaf in content.items() if isinstance(leaf, Tensor) and not leaf.is_sparse
        }
        for name, leaf in self._tensors.items():
            if leaf.numel() * leaf.itemsize > leaf.untyped_storage().nbytes():
                raise InputError(f"{self.path}: {name}: found shape {tuple(leaf.shape)}, more than its memory holds")
        self.shapes = {name: tuple(leaf.shape) for name, leaf in self._tensors.items()}
        self.dtypes = {name: str(leaf.dtype).removeprefix("torch.") for name, leaf in self._tensors.items()}

    def _check(self) -> None:
        """Refuses compressed archives, which torch.save does not write, and pickles that name what no weights need."""
        with open(self.path, "rb") as file:
            if not zipfile.is_zipfile(file):  # as before torch 1.6: the state dict's is the fourth of several pickles
                file.seek(0)
                for _ in range(4):
                    self._check_pickle(file)
                return
            archive = zipfile.ZipFile(file)
            if sum(info.file_size for info in archive.infolist()) > os.path.getsize(self.path):
                raise InputError(f"{self.path}: found a compressed archive, which torch.save does not write")
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            self._check_pickle(archive.open(pickled))

    def _check_pickle(self, file: IO[bytes]) -> None:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and argument not in _NAMED):
                raise InputError(f"{self.path}: found {argument or operation.name}, expected nothing but tensors")

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_) -> None:
        self._tensors.clear()

    def read(self, name: str, parts: int = 1) -> list[Tensor]:
        return _parts(self._tensors.pop(name), parts, f"{self.path}: {name}")


def _get(content: Any, name: str) -> Any:
    return content.get(name) if isinstance(content, Mapping) else None


def _parts(leaf: Tensor, parts: int, what: str) -> list[Tensor]:
    if not leaf.is_floating_point():
        raise InputError(f"{what}: found an array of {leaf.dtype}, expected floating-point numbers")
    return list(leaf.detach().chunk(parts)) if parts > 1 else [leaf.detach()]


def write_file(path: str | os.PathLike, arrays: Iterable[tuple[str, Tensor]], comment: bytes = b"") -> None:
    """The arrays in float32 in the format that the path's suffix names; whole or not at all."""
    suffix = os.path.splitext(path)[1][1:]
    if suffix == "npz":
        return write_archive(path, arrays, comment)
    if suffix != "safetensors":
        raise InputError(f"{path}: found the suffix {suffix or 'none'}, expected one of {', '.join(FORMATS)}")
    from safetensors.torch import save_file

    metadata = {"format": "pt"} | ({"vitfn": comment.decode()} if comment else {})  # transformers asks for the format
    tensors = {name: leaf.detach().to("cpu", torch.float32).contiguous() for name, leaf in arrays}
    with replacing(path) as file:
        permissions = os.stat(file.name).st_mode
        save_file(tensors, file.name, metadata)
        os.chmod(file.name, permissions)  # save_file's own are the owner's alone
