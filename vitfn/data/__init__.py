"""Datasets by name, in memory or as files; `augment` and `batches` turn them into training and evaluation batches."""

from collections.abc import Callable

from vitfn.data import cifar, digits, folder, lists
from vitfn.data.dataset import Dataset as Dataset
from vitfn.data.dataset import Files as Files
from vitfn.data.dataset import Split as Split
from vitfn.errors import InputError

# name -> function of data_dir, download, and the options of what consists of files
DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": lambda data_dir, download, **options: digits.load(),
    "cifar10": lambda data_dir, download, **options: cifar.load("cifar10", data_dir, download),
    "cifar100": lambda data_dir, download, **options: cifar.load("cifar100", data_dir, download),
    "folder": lambda data_dir, download, **options: folder.load(data_dir, **options),
    "list": lambda data_dir, download, **options: lists.load(data_dir, **options),
}


def load(
    name: str,
    data_dir: str = "data",
    download: bool = False,
    *,
    channels: int = 3,
    val_fraction: float = 0.1,
    seed: int = 0,
    train_fraction: float = 1.0,
) -> Dataset:
    """A dataset by name, from files under `data_dir` where it has any, which `download` fetches if they are absent.

    'folder' and 'list' are decoded to `channels`, and hold out `val_fraction` where they have no split of their own.
    Of the training images the first `train_fraction` are there, as of TensorFlow's train[:98%].
    """
    if name not in DATASETS:
        raise InputError(f"--dataset: found {name!r}, expected one of {', '.join(DATASETS)}")
    dataset = DATASETS[name](data_dir, download, channels=channels, val_fraction=val_fraction, seed=seed)
    return dataset._replace(train=dataset.train.part(0, max(1, round(train_fraction * dataset.train.size))))
