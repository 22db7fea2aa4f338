"""What a dataset is, and the table of those that can be asked for by name."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitfn.errors import InputError


class Split(NamedTuple):
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    """Two splits that share nothing, and the names of the classes that their labels count."""

    train: Split
    test: Split
    class_names: tuple[str, ...]


def _digits(data_dir: str, download: bool) -> Dataset:
    from vitfn.data import digits

    return digits.load()


def _cifar(name: str) -> Callable[[str, bool], Dataset]:
    def load(data_dir: str, download: bool) -> Dataset:
        from vitfn.data import cifar

        return cifar.load(name, data_dir, download)

    return load


DATASETS: dict[str, Callable[[str, bool], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
}


def load(name: str, data_dir: str = "data", download: bool = False) -> Dataset:
    """A dataset by name, from files under `data_dir` where it has any, which `download` fetches if they are absent."""
    if name not in DATASETS:
        raise InputError(f"--dataset: found {name!r}, expected one of {', '.join(DATASETS)}")
    return DATASETS[name](data_dir, download)
