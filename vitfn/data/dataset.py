"""What a dataset is, and how one list of images becomes two."""

import os
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vitfn import rng
from vitfn.errors import InputError

VALIDATION = ("val", "validation", "test")  # what the part that is held out may be named, the first that is there


class Split(NamedTuple):
    """Images (N, C, H, W) uint8 in memory and labels: (N,) int64, or (N, K) float32 of 0 and 1 for several an image."""

    images: Tensor
    labels: Tensor

    @property
    def size(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def part(self, start: int, stop: int) -> "Split":
        return Split(self.images[start:stop], self.labels[start:stop])

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


class Files(NamedTuple):
    """Image files of any sizes, decoded when they are needed, to so many channels; labels as those of a Split."""

    paths: tuple[str, ...]
    labels: Tensor
    channels: int

    @property
    def size(self) -> int:
        return len(self.paths)

    def part(self, start: int, stop: int) -> "Files":
        return self._replace(paths=self.paths[start:stop], labels=self.labels[start:stop])

    def to(self, device: torch.device | str) -> "Files":
        """The labels go there; pixels are decoded on the host."""
        return self._replace(labels=self.labels.to(device))


class Dataset(NamedTuple):
    """Two splits that share nothing, and the names of the classes that their labels count."""

    train: Split | Files
    test: Split | Files
    class_names: tuple[str, ...]


def joined(dataset: Dataset) -> Split | Files:
    """The images of both splits, those for training first."""
    splits = (dataset.train, dataset.test)
    labels = torch.cat([split.labels for split in splits])
    if files := [split for split in splits if isinstance(split, Files)]:
        return files[0]._replace(paths=tuple(path for split in files for path in split.paths), labels=labels)
    return Split(torch.cat([split.images for split in splits if isinstance(split, Split)]), labels)


def divide(files: Files, root: Path, fraction: float, seed: int) -> tuple[Files, Files]:
    """Training and validation files: about `fraction` of each class for the latter, but never all of it.

    A function of the seed and each file's name below `root`, whatever the order. One with several labels is held out
    where all of its classes can spare it. Raises InputError where that leaves none, or for a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise InputError(f"--val_fraction: found {fraction}, expected a number between 0 and 1")
    key = rng.stream(seed, "validation")
    names = [path.removeprefix(f"{root}{os.sep}").replace(os.sep, "/") for path in files.paths]
    order = sorted((rng.fold_in(key, zlib.crc32(os.fsencode(name))), name, i) for i, name in enumerate(names))
    classes = [_classes_of(labels) for labels in files.labels]
    images = Counter(label for row in classes for label in row)
    spare = {label: min(count - 1, int(fraction * count + 0.5)) for label, count in images.items()}
    held = torch.zeros(files.size, dtype=torch.bool)
    for _, _, i in order:
        if all(spare[label] > 0 for label in classes[i]):
            held[i] = True
            spare.update((label, spare[label] - 1) for label in classes[i])
    if not held.any():
        raise InputError(
            f"--val_fraction: found {fraction}, which leaves none of the {files.size:,} images of {root} for "
            "validation; expected a larger one, or more images in a class"
        )
    train, val = (
        Files(tuple(files.paths[i] for i in index.tolist()), files.labels[index], files.channels)
        for index in ((~held).nonzero()[:, 0], held.nonzero()[:, 0])
    )
    return train, val


def _classes_of(labels: Tensor) -> list[int]:
    """Those of one image; no label at all is a class of its own, -1."""
    return labels.nonzero()[:, 0].tolist() or [-1] if labels.ndim else [int(labels)]
