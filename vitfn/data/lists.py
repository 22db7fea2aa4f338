"""Lists of image files and their labels, as CSV or JSON lines."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from vitfn.data.dataset import VALIDATION, Dataset, Files, divide
from vitfn.errors import InputError

_SUFFIXES = (".csv", ".jsonl")


class _Row(NamedTuple):
    line: int
    image: str
    labels: list[str]
    several: bool  # whether the column or key was 'labels'


def load(data_dir: str, *, channels: int = 3, val_fraction: float = 0.1, seed: int = 0) -> Dataset:
    """Image files by name, decoded later to `channels`.

    `data_dir` is one list, of which `val_fraction` of each class is for validation, chosen by the seed and the files'
    names; or a folder with a list train and one of val, validation or test. CSV has a header with image and label, or
    with image and labels, which '|' separates; JSON lines have these as keys, labels as a list. With labels an image
    has any number of them. Names are relative to the list's folder. Classes are the labels for training, sorted,
    or the lines of classes.txt beside the list. Raises InputError, with file and line, for lists that are not so.
    """
    path = Path(data_dir)
    if not path.is_dir():
        rows = _read(path)
        _check_distinct(path, rows)
        classes = _class_names(path, rows)
        train, test = divide(_files(path, rows, classes, rows[0].several, channels), path.parent, val_fraction, seed)
        return Dataset(train, test, classes)
    train_path, test_path = _find(path, "train"), _find(path, *VALIDATION)
    rows = _read(train_path)
    classes = _class_names(train_path, rows)
    train, test = (
        _files(path, rows_of, classes, rows[0].several, channels)
        for path, rows_of in ((train_path, rows), (test_path, _read(test_path)))
    )
    return Dataset(train, test, classes)


def _find(folder: Path, *stems: str) -> Path:
    names = [stem + suffix for stem in stems for suffix in _SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: found no list, expected {' or '.join(names)}; or --data_dir=FILE for a single one")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: found no such file or folder, expected a list or a folder of lists") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: found bytes that are not UTF-8, expected text in UTF-8") from None


def _read(path: Path) -> list[_Row]:
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path}: found a list named {path.suffix or 'without a suffix'}, expected .csv or .jsonl")
    rows = list((_csv_rows if path.suffix == ".csv" else _json_rows)(path, _text(path)))
    if not rows:
        raise InputError(f"{path}: found no images, expected a line for each")
    for row in rows:
        if not row.image or not all(row.labels):
            raise _error(path, row.line, "an empty name", "an image and its label")
    return rows


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    end = 0
    try:
        for cells in reader:
            line, end = end + 1, reader.line_num  # a row begins after the last one's end: quotes hold line ends
            if not any(cells):
                continue
            if not header:
                header = cells
                if "image" not in header or ("label" in header) == ("labels" in header):
                    raise _error(path, line, f"the columns {', '.join(header)}", "image and label, or image and labels")
                continue
            if len(cells) != len(header):
                raise _error(path, line, f"{len(cells)} cells", f"{len(header)}, as in the header")
            row = dict(zip(header, cells, strict=True))
            if "label" in row:
                yield _Row(line, row["image"], [row["label"]], False)
            else:
                yield _Row(line, row["image"], row["labels"].split("|") if row["labels"] else [], True)
    except csv.Error as error:
        raise _error(path, end + 1, f"broken CSV ({error})", "cells separated by commas") from None


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    for line, source in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings hold U+2028 and its like
        if not source.strip():
            continue
        try:
            value = json.loads(source)
            json.dumps(value, ensure_ascii=False).encode()  # JSON's escapes can make halves of characters
            match value:
                case {"image": str(image), "label": str(label)}:
                    yield _Row(line, image, [label], False)
                case {"image": str(image), "labels": [*labels]} if all(isinstance(label, str) for label in labels):
                    yield _Row(line, image, labels, True)
                case _:
                    raise ValueError
        except (ValueError, RecursionError):
            expected = '{"image": "a.jpg", "label": "cat"} or {"image": "a.jpg", "labels": ["cat", "dog"]}'
            raise _error(path, line, source[:100], expected) from None


def _class_names(path: Path, rows: list[_Row]) -> tuple[str, ...]:
    fixed = path.parent / "classes.txt"
    if not fixed.exists():
        names = sorted({label for row in rows for label in row.labels})
    else:
        names = [name.strip() for name in _text(fixed).split("\n") if name.strip()]
        if again := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"{fixed}: found {again[0]!r} more than once, expected every class on a line of its own")
    if not names:
        raise InputError(f"{fixed if fixed.exists() else path}: found no classes, expected at least one")
    return tuple(names)


def _files(path: Path, rows: list[_Row], class_names: tuple[str, ...], several: bool, channels: int) -> Files:
    index = {name: label for label, name in enumerate(class_names)}
    for row in rows:
        if row.several != several:
            raise _error(path, row.line, *(("labels", "label") if row.several else ("label", "labels")))
        if unknown := [label for label in row.labels if label not in index]:
            raise _error(path, row.line, f"the class {unknown[0]!r}", f"one of {', '.join(class_names)[:300]}")
    labels = torch.zeros(len(rows), len(class_names)) if several else torch.zeros(len(rows), dtype=torch.int64)
    for i, row in enumerate(rows):
        if several:
            labels[i, [index[label] for label in row.labels]] = 1
        else:
            labels[i] = index[row.labels[0]]
    return Files(tuple(str(path.parent / row.image) for row in rows), labels, channels)


def _check_distinct(path: Path, rows: list[_Row]) -> None:
    """So that no image is both trained on and validated with."""
    first: dict[str, int] = {}
    for row in rows:
        if (line := first.setdefault(row.image, row.line)) != row.line:
            raise _error(path, row.line, f"{row.image} again (first in line {line})", "every image once")


def _error(path: Path, line: int, found: str, expected: str) -> InputError:
    return InputError(f"{path}: line {line}: found {found}, expected {expected}")
