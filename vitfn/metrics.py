"""What predictions are worth: numbers and tables of a whole split, as functions of CPU tensors.

N images, K classes. With several labels an image ("multi-label") each class is a question of its own.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitfn.files import replacing

_BINS = 15  # of confidence, as in Guo et al.


class Predictions(NamedTuple):
    """What is known of each image of a split, in the split's order; in brackets: with several labels an image."""

    labels: Tensor  # (N,) int64 [(N, K) float32, 0 or 1]
    loss: Tensor  # (N,) float32
    predicted: Tensor  # (N,) int64 [(N, K) bool]
    confidence: Tensor  # (N,) float32, the softmax probability of the prediction [(N, K) float32, each class's sigmoid]
    in_top5: Tensor | None  # (N,) bool [None]

    @property
    def multi_label(self) -> bool:
        return self.labels.dim() == 2

    @property
    def right(self) -> Tensor:
        """Which images are right in everything: (N,) bool."""
        same = self.predicted == self.labels
        return same.all(1) if self.multi_label else same


def measures(p: Predictions) -> dict[str, float]:
    """Mean `loss`, `accuracy` (0 to 1), `correct` of `count` images; `top5` and `calibration_error` (0 to 1).

    With several labels an image, an image is right if all its K answers are, and `mean_average_precision` (0 to 1)
    takes the place of the last two.
    """
    correct, count = float(p.right.sum()), float(len(p.labels))
    numbers = {"loss": float(p.loss.double().mean()), "accuracy": correct / count, "correct": correct, "count": count}
    if p.in_top5 is None:
        return numbers | {"mean_average_precision": mean_average_precision(p.labels, p.confidence)}
    return numbers | {"top5": float(p.in_top5.double().mean()), "calibration_error": calibration_error(p)}


def calibration_bins(p: Predictions) -> Tensor:
    """Images, right images and summed confidence in each of 15 equal bins (lo, hi] of confidence: (3, 15) float64."""
    edges = torch.arange(1, _BINS) / _BINS
    place = torch.bucketize(p.confidence, edges)  # (N,); what is not a number comes last, and stays one in the sum
    values = torch.stack([torch.ones_like(p.confidence), p.right.float(), p.confidence]).double()  # (3, N)
    return torch.zeros(3, _BINS, dtype=torch.float64).index_add(1, place, values)


def calibration_error(p: Predictions) -> float:
    """The expected calibration error, 0 to 1: the mean over images of |accuracy - confidence| of their bin.

    Guo et al., arXiv 1706.04599, equation 3.
    """
    images, right, confidence = calibration_bins(p)
    return float((right - confidence).abs().sum() / images.sum())


def average_precision(labels: Tensor, scores: Tensor) -> float:
    """The area under the precision-recall curve of labels and scores (N,): sum of (R_n - R_n-1) P_n over thresholds.

    `nan` where nothing is positive, or a score is not a number.
    """
    if not labels.any() or scores.isnan().any():
        return math.nan
    scores, order = scores.sort(descending=True)
    hits, seen = labels[order].double().cumsum(0), torch.arange(1, len(scores) + 1)
    threshold = torch.ones_like(order, dtype=torch.bool)
    threshold[:-1] = scores[1:] != scores[:-1]  # one threshold for all equal scores
    hits, seen = hits[threshold], seen[threshold]
    recall, precision = hits / hits[-1], hits / seen
    return float((recall.diff(prepend=recall.new_zeros(1)) * precision).sum())


def mean_average_precision(labels: Tensor, scores: Tensor) -> float:
    """The mean of the classes' average precisions, from labels and scores (N, K), over the classes that have images."""
    present = labels.any(0)
    each = [average_precision(*column) for column in zip(labels.T[present], scores.T[present], strict=True)]
    return sum(each) / len(each) if each else math.nan


def confusion(p: Predictions, num_classes: int) -> Tensor:
    """How many images of each class (row) were taken for each class (column): (K, K) int64. One label an image."""
    pairs = p.labels * num_classes + p.predicted
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


class ClassRow(NamedTuple):
    """A class: its images, how many of them were found, and fractions from 0 to 1, None where they are undefined."""

    name: str
    images: int
    right: int
    recall: float | None  # of its images, those found
    precision: float | None  # of what was taken for it, what it was
    f1: float | None  # their harmonic mean


def per_class(p: Predictions, class_names: Sequence[str]) -> list[ClassRow]:
    """A row for each class, in the classes' order."""
    if p.multi_label:
        images, claimed, right = p.labels.sum(0), p.predicted.sum(0), (p.labels * p.predicted).sum(0)  # each (K,)
    else:
        found = p.labels[p.right]
        images, claimed, right = (
            torch.bincount(classes, minlength=len(class_names)) for classes in (p.labels, p.predicted, found)
        )

    def fraction(a: int, b: int) -> float | None:
        return a / b if b else None

    return [
        ClassRow(
            name, int(n), int(r), fraction(int(r), int(n)), fraction(int(r), int(c)), fraction(2 * int(r), int(n + c))
        )
        for name, n, c, r in zip(class_names, images, claimed, right, strict=True)
    ]


def most_confused(confusion: Tensor, class_names: Sequence[str], k: int = 10) -> list[tuple[str, str, int]]:
    """The k most frequent mistakes as (true, predicted, images), the most frequent first; none that never happened."""
    mistakes = confusion.clone().fill_diagonal_(0).flatten()
    counts, places = mistakes.sort(descending=True, stable=True)
    return [
        (class_names[place // len(confusion)], class_names[place % len(confusion)], count)
        for count, place in zip(counts[:k].tolist(), places[:k].tolist(), strict=True)
        if count
    ]


def write_confusion_csv(path: str | os.PathLike, confusion: Tensor, class_names: Sequence[str]) -> None:
    """Counts (K, K) as a table: a line for each true class, a column for each predicted one."""
    rows = ([name, *counts] for name, counts in zip(class_names, confusion.tolist(), strict=True))
    _write_csv(path, ["true \\ predicted", *class_names], rows)


def write_per_class_csv(path: str | os.PathLike, rows: Iterable[ClassRow]) -> None:
    """The rows of `per_class` as a table; what is undefined is empty."""
    _write_csv(path, ClassRow._fields, rows)


def _write_csv(path: str | os.PathLike, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with replacing(path) as file:
        file.write(text.getvalue().encode(errors="replace"))  # names of folders may hold what is no character
