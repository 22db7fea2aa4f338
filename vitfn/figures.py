"""Pictures of a run: functions that return matplotlib figures, which is optional and imported where it is used."""

import base64
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitfn.errors import InputError
from vitfn.files import replacing
from vitfn.metrics import Predictions, calibration_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 6  # inches, so that letters of 10 points can be read on a telephone
_DPI = 160
_TRAINING, _TEST = "#0072b2", "#d55e00"  # Okabe and Ito's blue and vermilion, which every eye tells apart
_NAMED, _NUMBERED = 25, 30  # the most classes that are named at an axis, and whose cells hold numbers
_ABOVE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 0.98),
    "ncols": 3,
    "frameon": False,
    "fontsize": 8,
}
_THUMBNAIL = 128  # pixels of the longer side
_PANELS = (  # label of the axis, its scale, the rows' names and what to call them
    ("loss", "linear", {"train/loss": "training", "eval/loss": "test"}),
    ("accuracy (%)", "linear", {"eval/accuracy": "test"}),
    ("mean average precision (%)", "linear", {"eval/mean_average_precision": "test"}),
    ("learning rate", "linear", {"train/learning_rate": "training"}),
    ("gradient norm", "log", {"train/grad_norm": "training"}),
)


def blank(height: float) -> "Figure":
    """An empty figure, `height` inches high. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib; install it with: pip install matplotlib") from None
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """The picture at `path`, whose suffix names the format. Raises InputError for one that matplotlib cannot write."""
    try:
        with replacing(path) as file:
            figure.savefig(file, format=Path(path).suffix[1:].lower() or "png", dpi=_DPI)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a path of a picture, found: {error}") from None


def png_uri(png: bytes) -> str:
    """A PNG file's bytes as an address that holds them."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def data_uri(figure: "Figure") -> str:
    """The picture, on a transparent ground, as an address that holds it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, transparent=True)
    return png_uri(file.getvalue())


def thumbnail_uri(image: Tensor) -> str:
    """An image (C, H, W) uint8 as an address that holds a small PNG: in colour from three channels, else the first."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("thumbnails need Pillow; install it with: pip install pillow") from None
    pixels = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]  # (H, W, 3) or (H, W)
    height, width = pixels.shape[:2]
    scale = _THUMBNAIL / max(height, width)
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    file = io.BytesIO()
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    Image.fromarray(pixels.contiguous().numpy()).resize(size, resample).save(file, "png")
    return png_uri(file.getvalue())


def curves_figure(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Loss, accuracy, learning rate and gradient norm by step, from rows of metrics.jsonl: a panel for each there is.

    None, a value that was not finite, is a gap in its curve and a cross below it.
    """
    panels = [panel for panel in _PANELS if any(name in row for row in rows for name in panel[2])]
    figure = blank(0.6 + 2.1 * len(panels))
    each = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, scale, names) in zip(each, panels, strict=True):
        positive = any((row.get(name) or 0) > 0 for row in rows for name in names)
        axes.set(ylabel=label, yscale=scale if positive else "linear")
        axes.grid(alpha=0.3)
        for name, called in names.items():
            _curve(axes, [(row["step"], row[name]) for row in rows if name in row], called, 100 if "%" in label else 1)
        if len(axes.lines) > 1:
            axes.legend(**_ABOVE)
    each[-1].set_xlabel("step")
    return figure


def _curve(axes: "Axes", points: list[tuple[int, float | None]], called: str, factor: float) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    y = [math.nan if value is None else factor * value for value in values]
    testing = called == "test"
    marker = "o" if testing or len(points) == 1 else ""
    axes.plot(
        steps, y, marker=marker, markersize=4, label=called, linewidth=1.5 if testing else 0.9,
        color=_TEST if testing else _TRAINING, zorder=3 if testing else 2,
    )  # fmt: skip
    if lost := [step for step, value in zip(steps, y, strict=True) if not math.isfinite(value)]:
        where = axes.get_xaxis_transform()  # steps to the right, the panel's height upwards
        axes.plot(lost, [0.04] * len(lost), "kx", transform=where, markersize=5, label=f"{called}: not finite")


def confusion_figure(confusion: Tensor, class_names: Sequence[str]) -> "Figure":
    """Counts (K, K), true classes downwards: each cell's colour is its share of the row, its number the images."""
    figure = blank(5.4)
    from matplotlib.colors import PowerNorm

    k = len(class_names)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)  # (K, K)
    axes = figure.subplots()
    norm = PowerNorm(0.5, 0, 1)  # the square root, so that rare mistakes are seen beside the diagonal
    image = axes.imshow(shares.numpy(), cmap="Blues", norm=norm)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class's images", format="{x:.0%}", ticks=
                    [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1])  # fmt: skip
    shown = list(range(0, k, math.ceil(k / _NAMED)))
    labels = _labels([class_names[i] for i in shown], shown)
    small: dict[str, Any] = {"fontsize": 9 if len(shown) <= 12 else 7, "parse_math": False}
    axes.set_xticks(shown, labels, rotation=90 if len(labels) * max(map(len, labels)) > 40 else 0, **small)
    axes.set_yticks(shown, labels, **small)
    axes.set(xlabel="predicted class", ylabel="true class")
    if k <= _NUMBERED:
        size = min(10, 430 / (k * max(2, len(str(int(confusion.max()))))))  # points; the axes have 300
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.3 else "black"
            text = str(int(confusion[row, column]))
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    return figure


def _labels(names: Sequence[str], places: Sequence[int]) -> list[str]:
    """Names short enough for an axis; by number if the font lacks a letter of theirs."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    letters = get_font(findfont(FontProperties())).get_charmap()  # by code point
    short = (name if len(name) <= 16 else name[:15] + "…" for name in names)
    drawable = ((name, all(ord(c) in letters for c in name)) for name in short)
    return [name if can else f"#{place}" for (name, can), place in zip(drawable, places, strict=True)]


def reliability_figure(p: Predictions) -> "Figure":
    """How often predictions of some confidence are right, beside how often they should be, and how many there are."""
    images, right, confidence = calibration_bins(p)
    width = 100 / len(images)  # percent
    there = images > 0
    left = (torch.arange(len(images)) * width)[there].tolist()
    figure = blank(4.2)
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    above.bar(left, (100 * right / images)[there].tolist(), width, align="edge", color="#8fc1e3", edgecolor=_TRAINING)
    above.plot([0, 100], [0, 100], "--", color="gray", linewidth=1, label="perfectly calibrated")
    above.plot(
        (100 * confidence / images)[there].tolist(), (100 * right / images)[there].tolist(), "D", color=_TEST,
        markersize=4, label="mean confidence and accuracy of a bar",
    )  # fmt: skip
    above.set(xlim=(0, 100), ylim=(0, 105), ylabel="accuracy (%)")
    above.legend(**_ABOVE)
    below.bar(left, images[there].tolist(), width, align="edge", color="#cccccc", edgecolor="#666666")
    below.set(ylabel="images", xlabel="confidence of the prediction (%)")
    return figure
