"""Folders of image files: a sub-folder for each class."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from vitfn.data.dataset import VALIDATION, Dataset, Files, divide
from vitfn.data.images import SUFFIXES
from vitfn.errors import InputError


def load(data_dir: str, *, channels: int = 3, val_fraction: float = 0.1, seed: int = 0) -> Dataset:
    """Image files, decoded later to `channels`; the classes are the sub-folders, sorted by name.

    `data_dir` holds train and one of val, validation or test, the first that is there, each with a sub-folder for
    every class. Or it holds the classes' sub-folders itself, and `val_fraction` of each class is for validation, chosen
    by the seed and the files' names. Images are found at any depth; hidden files are left out, and with a warning those
    whose names are not an image's. Raises InputError for folders that are not so.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"{root}: found no such folder, expected one with a sub-folder of images for each class")
    val = next((root / name for name in VALIDATION if (root / name).is_dir()), None)
    if (root / "train").is_dir() and val:
        training, testing = _classes(root / "train"), _classes(val)
        if unknown := sorted(testing.keys() - training.keys()):
            raise InputError(f"{val / unknown[0]}: found a class that is not in {root / 'train'}, expected it there")
        _check_filled(root / "train", training)
        if not any(testing.values()):
            raise InputError(f"{val}: found no images in its sub-folders, expected {', '.join(SUFFIXES)}")
        train, test = (_files(classes, tuple(training), channels) for classes in (training, testing))
        return Dataset(train, test, tuple(training))
    classes = _classes(root)
    if list(classes) == ["train"]:
        raise InputError(
            f"{root}: found train, but none of {', '.join(VALIDATION)} beside it; expected one, or --data_dir="
            f"{root / 'train'} to hold some of it out"
        )
    _check_filled(root, classes)
    train, test = divide(_files(classes, tuple(classes), channels), root, val_fraction, seed)
    return Dataset(train, test, tuple(classes))


def _classes(folder: Path) -> dict[str, list[str]]:
    """Each class's image files, sorted."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder}: found no sub-folders, expected one for each class")
    return images_in(folder, names)


def images_in(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The image files at any depth below each of the sub-folders, sorted; hidden ones are left out.

    Those whose names are not an image's are too, with a warning.
    """
    found = {name: sorted(_walk(folder / name)) for name in names}
    others = [path for paths in found.values() for path in paths if not path.lower().endswith(SUFFIXES)]
    if others:
        logging.getLogger("vitfn").warning(
            "%s: left out %d files that are no images by their names, such as %s", folder, len(others), others[0]
        )
    return {name: [path for path in paths if path.lower().endswith(SUFFIXES)] for name, paths in found.items()}


def _walk(folder: Path) -> list[str]:
    """All files below that are not hidden."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = (name for name in folders if not name.startswith("."))
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return found


def _unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: found a folder that cannot be read ({error.strerror})") from None


def _check_filled(folder: Path, classes: dict[str, list[str]]) -> None:
    for name, paths in classes.items():
        if not paths:
            raise InputError(f"{folder / name}: found no images in this class, expected {', '.join(SUFFIXES)}")


def _files(classes: dict[str, list[str]], class_names: tuple[str, ...], channels: int) -> Files:
    images = [(path, label) for label, name in enumerate(class_names) for path in classes.get(name, ())]
    return Files(tuple(path for path, _ in images), torch.tensor([label for _, label in images]), channels)
