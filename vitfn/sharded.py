"""Checkpoints as directories, to which every process writes its share of the leaves (torch.distributed.checkpoint).

`manifest.json`, written last, makes one complete: what the leaves are, where they lie, and the checksum of every file.
"""

import json
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfn.archive import blaming
from vitfn.errors import InputError, RunError, one_line
from vitfn.files import replacing
from vitfn.parallel import Ranks

MANIFEST = "manifest.json"
_CHUNK = 1 << 20  # bytes
_DTYPES = {
    str(dtype)[6:]: dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
}


def is_complete(path: str | os.PathLike) -> bool:
    """Whether there is a checkpoint's directory that was written to its end."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def remove(path: Path) -> None:
    """Removes a checkpoint's directory, the manifest first: what a kill leaves of it does not count."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def together(ranks: Ranks, function: Callable[[], Any]) -> list[Any]:
    """What the function returns in each process; where it raises OSError in one, all raise it."""
    found = problem = None
    try:
        found = function()
    except OSError as error:
        problem = error.strerror or str(error)
    results = ranks.gather((found, problem))
    for rank, (_, problem) in enumerate(results):
        if problem:
            raise OSError(f"process {rank}: {problem}")
    return [found for found, _ in results]


def write(path: Path, leaves: Mapping[str, Tensor], notes: dict[str, Any], ranks: Ranks) -> None:
    """All processes write the leaves, DTensors or the same tensor in each, and the first of them `notes`, JSON.

    The same files are written to a path that exists. Raises OSError, in all processes, if one of them cannot write.
    """
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # of torch 2.7's own code
    # left by a writer that was killed, or damaged when the run went on
    together(ranks, lambda: remove(path) if ranks.first and path.exists() else None)
    try:
        saved = dcp.save(
            dict(leaves),
            storage_writer=dcp.FileSystemWriter(path, per_thread_copy_ahead=0),  # they are on the CPU already
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            process_group=ranks.host,
        )
        names = sorted({".metadata", *(place.relative_path for place in saved.storage_data.values())})
        mine = names[ranks.rank :: ranks.count]
        summed = together(ranks, lambda: {name: _size_and_checksum(path / name) for name in mine})
        files = {name: found for part in summed for name, found in part.items()}
        content = {"notes": notes, "leaves": _described(saved), "files": files}
        together(ranks, lambda: _write_manifest(path, content) if ranks.first else None)
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        _forget(path, ranks)
        raise OSError(f"process {rank}: {getattr(cause, 'strerror', None) or one_line(cause, 200)}") from None
    except OSError:
        _forget(path, ranks)
        raise
    except RuntimeError as error:  # of a collective
        reason = one_line(error, 200)
        raise RunError(f"{path}: the processes lost each other while they wrote it ({reason})") from None


def _forget(path: Path, ranks: Ranks) -> None:
    """Makes room: none of the processes is writing any more."""
    if ranks.first:
        shutil.rmtree(path, ignore_errors=True)


def _described(saved: Any) -> dict[str, Any]:
    """The leaves of DCP's metadata as JSON: its own file of it is a pickle, which nobody has to trust then."""
    leaves: dict[str, Any] = {}
    for name, leaf in saved.state_dict_metadata.items():
        leaves[name] = {"dtype": str(leaf.properties.dtype)[6:], "shape": list(leaf.size), "chunks": []}
    sizes = {
        (name, tuple(chunk.offsets)): chunk.sizes
        for name, leaf in saved.state_dict_metadata.items()
        for chunk in leaf.chunks
    }
    for index, place in saved.storage_data.items():
        shape = sizes[index.fqn, tuple(index.offset)]
        if math.prod(shape):  # a process that has no share of a leaf writes an empty one
            chunk = [list(index.offset), list(shape), place.relative_path, place.offset, place.length]
            leaves[index.fqn]["chunks"].append(chunk)
    return leaves


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    with replacing(path / MANIFEST) as file:
        file.write(json.dumps({"crc32": _checksum(content), "content": content}).encode() + b"\n")


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _size_and_checksum(path: Path) -> list[int]:
    size = checksum = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_CHUNK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


class _Place(NamedTuple):
    """Where a chunk of a leaf lies, by the names that DCP's reader asks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


class _Chunk(NamedTuple):
    start: tuple[int, ...]  # in the leaf
    shape: tuple[int, ...]
    place: _Place


class Directory:
    """A complete checkpoint's directory, open for reading: `shapes` and `dtypes` by leaf, and its `notes`.

    Nothing in it is unpickled: what DCP would read from `.metadata` the manifest says, and tensors are loaded with
    weights_only. Raises InputError where the manifest is damaged; `verify` says whether the files are.
    """

    kind = "sharded"
    owned = True

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with blaming(f"{self.path}/{MANIFEST}", "damaged, or no checkpoint's manifest"):
            manifest = json.loads(Path(path, MANIFEST).read_bytes())
            content = manifest["content"]
            if _checksum(content) != manifest["crc32"]:
                raise ValueError("bad CRC-32")
            self.notes: dict[str, Any] = content["notes"]
            self._files = {name: (int(size), int(checksum)) for name, (size, checksum) in content["files"].items()}
            if outside := [name for name in self._files if Path(name).name != name]:
                raise ValueError(f"{outside[0]} is no file's name")
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.dtypes: dict[str, str] = {}
            self._chunks: dict[str, list[_Chunk]] = {}
            for name, leaf in content["leaves"].items():
                self.shapes[name], self.dtypes[name] = tuple(map(int, leaf["shape"])), leaf["dtype"]
                self._chunks[name] = [self._chunk(name, *chunk) for chunk in leaf["chunks"]]
                if sum(math.prod(chunk.shape) for chunk in self._chunks[name]) != math.prod(self.shapes[name]):
                    raise ValueError(f"{name} is not whole")

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, *_) -> None:
        pass

    def _chunk(self, name: str, start: list[int], shape: list[int], file: str, offset: int, length: int) -> _Chunk:
        chunk = _Chunk(tuple(map(int, start)), tuple(map(int, shape)), _Place(file, int(offset), int(length)))
        ends = zip(chunk.start, chunk.shape, self.shapes[name], strict=True)
        inside = all(0 <= first <= first + count <= all_of_them for first, count, all_of_them in ends)
        held = 0 <= offset <= offset + length <= self._files[file][0]
        if not (inside and held and math.prod(shape) * self.dtype(name).itemsize <= length):
            raise ValueError(f"{name} has a part that cannot be")
        return chunk

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a leaf was saved in."""
        return _DTYPES[self.dtypes[name]]

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Raises InputError for files that are missing or not as they were written; `part` of so many parts of them."""
        for name in sorted(self._files)[part::parts]:
            path = Path(self.path, name)
            try:
                found = tuple(_size_and_checksum(path))
            except OSError as error:
                raise InputError(f"{path}: expected a file of the checkpoint, found: {error.strerror}") from None
            if found != (expected := self._files[name]):
                sizes = f"{found[0]:,} bytes, expected {expected[0]:,}"
                raise InputError(f"{path}: found {'another checksum' if found[0] == expected[0] else sizes}")

    def fill(self, leaves: Mapping[str, Tensor]) -> None:
        """Reads into the memory of leaves that have the shapes in the directory; of a DTensor, the process's share.

        These are the steps of dcp.load without its collectives and its pickle: each process reads for itself.
        """
        import torch.distributed.checkpoint as dcp

        reader = dcp.FileSystemReader(self.path)
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        metadata = self._metadata(leaves)
        with blaming(self.path), torch.no_grad():
            planner.set_up_planner(dict(leaves), metadata, is_coordinator=True)
            reader.set_up_storage_reader(metadata, is_coordinator=True)
            (plan,) = planner.create_global_plan([planner.create_local_plan()])
            reader.read_data(planner.finish_plan(plan), planner).wait()

    def _metadata(self, names: Mapping[str, Any]) -> Any:
        from torch.distributed.checkpoint import metadata as dcp

        leaves: dict[str, Any] = {}
        places: dict[dcp.MetadataIndex, _Place] = {}
        for name in names:
            chunks = self._chunks[name]
            parts = [dcp.ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.shape)) for chunk in chunks]
            properties = dcp.TensorProperties(dtype=self.dtype(name))
            leaves[name] = dcp.TensorStorageMetadata(properties, torch.Size(self.shapes[name]), parts)
            places |= {dcp.MetadataIndex(name, chunk.start): chunk.place for chunk in chunks}
        return dcp.Metadata(leaves, storage_data=places)

    def read(self, name: str, parts: int = 1) -> list[Tensor]:
        """One leaf as float32 tensors on the CPU, equal parts of its first axis."""
        leaf = torch.empty(self.shapes[name], dtype=self.dtype(name))
        self.fill({name: leaf})
        return [part.clone() for part in leaf.float().chunk(parts)] if parts > 1 else [leaf.float()]
