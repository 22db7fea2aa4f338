"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from the official archive or its unpacked folder."""

import gzip
import logging
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitfn.data.dataset import Dataset, Split
from vitfn.data.download import download_file, md5
from vitfn.data.unpickle import unpickle
from vitfn.errors import InputError


class _Source(NamedTuple):
    """Where a dataset comes from, with official sizes and MD5 sums; `files` are those of the unpacked folder."""

    url: str
    size: int
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: bytes
    names: bytes
    files: dict[str, str]


_SOURCES = {
    "cifar10": _Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        size=170498071,
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        meta="batches.meta",
        labels=b"labels",
        names=b"label_names",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    "cifar100": _Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        size=169001437,
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train=("train",),
        test=("test",),
        meta="meta",
        labels=b"fine_labels",
        names=b"fine_label_names",
        files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}


def load(name: str, data_dir: str, download: bool = False) -> Dataset:
    """Both splits from `<data_dir>/<archive>.tar.gz` or the unpacked folder beside it; `download` fetches the former.

    Checksums that are not the official ones are a warning. Raises InputError where there is neither, and for files
    that are torn or hold anything but what CIFAR's hold.
    """
    source = _SOURCES[name]
    archive = Path(data_dir) / source.url.rsplit("/", 1)[1]
    folder = Path(data_dir) / source.folder
    if download and not archive.exists() and not folder.is_dir():
        download_file(source.url, archive, source.size, source.md5)
    if archive.exists():
        contents, where = _read_archive(archive, source), archive
        official = {archive: source.md5}
    elif folder.is_dir():
        contents = {name: (folder / name).read_bytes() for name in source.files if (folder / name).is_file()}
        where = folder
        official = {folder / name: source.files[name] for name in contents}
    else:
        raise InputError(
            f"--dataset={name}: found neither {archive} nor {folder}; get {source.url} ({source.size:,} bytes, "
            f"MD5 {source.md5}), or add --download"
        )
    names = _parse(where / source.meta, contents, lambda meta: tuple(_text(name) for name in meta[source.names]))

    def split(members: tuple[str, ...]) -> Split:
        parts = [
            _parse(where / m, contents, lambda batch: _images_and_labels(batch, source, len(names))) for m in members
        ]
        return Split(torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))

    dataset = Dataset(split(source.train), split(source.test), names)
    for path, checksum in official.items():
        if (found := md5(path)) != checksum:
            logging.getLogger("vitfn").warning("%s: MD5 %s is not the official %s", path, found, checksum)
    return dataset


def _read_archive(archive: Path, source: _Source) -> dict[str, bytes]:
    """The members by file name; nothing is unpacked onto the disk."""
    contents = {}
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                if name in source.files and member.isfile() and (file := tar.extractfile(member)):
                    contents[name] = file.read()
            while stream.read(1 << 20):  # to the end, where gzip keeps its checksum
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(
            f"{archive}: found a damaged archive ({error}), expected {source.size:,} bytes; fetch it again"
        ) from None
    return contents


def _parse(path: Path, contents: dict[str, bytes], read: Callable[[Any], Any]) -> Any:
    if path.name not in contents:
        raise InputError(f"{path}: missing")
    try:
        return read(unpickle(contents[path.name]))
    except Exception as error:  # a foreign pickle fails in any way it likes
        reason = f"{type(error).__name__}: {error}"[:200]
        raise InputError(f"{path}: found a pickle that is not CIFAR's ({reason}); fetch it again") from None


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _images_and_labels(batch: Any, source: _Source, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor(batch[source.labels], dtype=torch.int64)
    images = torch.from_numpy(batch[b"data"].array.reshape(len(labels), 3, 32, 32))
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels {int(labels.min())} to {int(labels.max())}, expected 0 to {num_classes - 1}")
    return images, labels
