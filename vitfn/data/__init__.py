"""Datasets by name, as uint8 tensors; `augment` and `batches` turn them into training and evaluation batches."""

from collections.abc import Callable
from functools import partial

from vitfn.data import cifar, digits
from vitfn.data.dataset import Dataset as Dataset
from vitfn.data.dataset import Split as Split
from vitfn.errors import InputError

# name -> function of (data_dir, download)
DATASETS: dict[str, Callable[[str, bool], Dataset]] = {
    "digits": lambda data_dir, download: digits.load(),
    "cifar10": partial(cifar.load, "cifar10"),
    "cifar100": partial(cifar.load, "cifar100"),
}


def load(name: str, data_dir: str = "data", download: bool = False) -> Dataset:
    """A dataset by name, from files under `data_dir` where it has any, which `download` fetches if they are absent."""
    if name not in DATASETS:
        raise InputError(f"--dataset: found {name!r}, expected one of {', '.join(DATASETS)}")
    return DATASETS[name](data_dir, download)
