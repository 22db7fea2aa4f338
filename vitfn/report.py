"""A run on one page: a report.html that needs no other file, no network and no script."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any, NamedTuple

from torch import Tensor

from vitfn import figures, page, tree
from vitfn.errors import InputError
from vitfn.metrics import Predictions, confusion, measures, most_confused, per_class

_FRACTIONS = {
    "accuracy": "accuracy",
    "top5": "top-5 accuracy",
    "mean_average_precision": "mean average precision",
    "calibration_error": "calibration error",
}
_SETTINGS = {
    "changed": "Flags not at their defaults",
    "resolved": "Device",
    "model": "Model",
    "versions": "Versions",
}


class Sample(NamedTuple):
    """An image with what it is, what it was taken for, and how surely: `image` (C, H, W) uint8, `confidence` 0 to 1."""

    image: Tensor
    true: str
    predicted: str
    confidence: float


def write(
    path: str | os.PathLike,
    *,
    command: str,
    config: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    predictions: Predictions | None,
    class_names: Sequence[str],
    samples: Sequence[Sample],
) -> None:
    """Writes the page: `config` is that of config.json, `rows` are those of metrics.jsonl.

    `config["changed"]`, if it is there, holds the flags that are not at their defaults. What is not known of a run
    (no `rows`, no `predictions`, no `samples`) is left out; without matplotlib or Pillow the page says what to install.
    """
    notes = _failures(config)

    def picture(make: Callable[[], str]) -> str:
        try:
            return make()
        except InputError as error:
            notes.append(str(error))
            return ""

    def drawn(figure: Callable, alt: str, *arguments: Any) -> str:
        return picture(lambda: f'<img class="picture" alt="{alt}" src="{figures.data_uri(figure(*arguments))}">')

    pictures, tables = [], []
    if any("train/loss" in row for row in rows):
        pictures.append(drawn(figures.curves_figure, "Curves of the run, by step.", rows))
    if predictions:
        tables.append("<h2>Classes, the worst first</h2>" + _class_table(predictions, class_names))
    if predictions and not predictions.multi_label:
        counts = confusion(predictions, len(class_names))
        matrix = drawn(figures.confusion_figure, "Confusion matrix: true and predicted classes.", counts, class_names)
        calibration = drawn(figures.reliability_figure, "Calibration: accuracy by confidence.", predictions)
        pictures += [matrix + calibration] if pictures else [matrix, calibration]  # the curves are as high as both
        tables.append(
            "<h2>Most frequent mistakes</h2>"
            + page.table(("true", "predicted", "images"), most_confused(counts, class_names), "words")
        )
    order = sorted(samples, key=lambda sample: (sample.true == sample.predicted, -sample.confidence))
    gallery = "".join(picture(partial(_sample, sample)) for sample in order)
    body = f"""<dl class="numbers">{_numbers(rows, predictions, len(class_names))}</dl>
{page.columns(pictures)}{page.columns(tables)}
{f'<h2>Samples, mistakes first</h2><div class="samples">{gallery}</div>' if gallery else ""}
<h2>Command</h2><pre>{escape(command)}</pre>
{page.columns(_settings(title, config[key]) for key, title in _SETTINGS.items() if config.get(key))}
"""
    page.write(path, config.get("name") or "report", _subtitle(config), notes, body)


def _settings(title: str, values: dict[str, Any]) -> str:
    return f"<h2>{title}</h2>" + page.table(("name", "value"), tree.flatten(values).items(), "words")


def _subtitle(config: dict[str, Any]) -> str:
    model, device = config.get("model", {}), config.get("resolved", {}).get("device")
    parameters = f"{model['parameters']:,} parameters" if "parameters" in model else None
    return ", ".join(str(part) for part in (model.get("name"), parameters, config.get("dataset"), device) if part)


def _failures(config: dict[str, Any]) -> list[str]:
    """What did not compile, of the steps."""
    steps = config.get("resolved", {}).get("compile", {}).items()
    return [
        f"compile={form} failed for the {name} step, which went on with compile={step['form']}: {reason}"
        for name, step in steps
        for form, reason in step.get("failures", {}).items()
    ]


def _percent(fraction: float | None) -> str:
    return "—" if fraction is None else "not finite" if not math.isfinite(fraction) else f"{fraction:.2%}"


def _numbers(rows: Sequence[dict[str, Any]], predictions: Predictions | None, num_classes: int) -> str:
    """The headline: how it ended, by the predictions or else by the last evaluation of the run."""
    last = {name: value for row in rows for name, value in row.items()}  # of each name the last
    ended = {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}
    if predictions:
        ended = measures(predictions)
    shown = {}
    for name, title in _FRACTIONS.items():
        if name in ended and (name != "top5" or num_classes > 5):
            shown[title] = _percent(math.nan if ended[name] is None else ended[name])
    if "accuracy" in shown and "count" in ended:
        shown["accuracy"] += f"<small>{ended['correct']:,.0f} of {ended['count']:,.0f} images</small>"
    for title, value in (("test loss", ended.get("loss", "")), ("training loss", last.get("train/loss", ""))):
        if value != "":
            shown[title] = f"{value:.4f}" if value is not None and math.isfinite(value) else "not finite"
    if trained := [row["step"] for row in rows if "train/loss" in row]:
        shown["steps"] = f"{max(trained):,}"
    return "".join(f"<div><dt>{title}</dt><dd>{value}</dd></div>" for title, value in shown.items())


def _class_table(predictions: Predictions, class_names: Sequence[str]) -> str:
    rows = sorted(per_class(predictions, class_names), key=lambda row: math.inf if row.recall is None else row.recall)
    cells = ((r.name, r.images, r.right, _percent(r.recall), _percent(r.precision), _percent(r.f1)) for r in rows)
    return page.table(("class", "images", "right", "recall", "precision", "F1"), cells)


def _sample(sample: Sample) -> str:
    right = sample.true == sample.predicted
    taken = f"<b>{'✓ right' if right else '✗ wrong'}</b> {_percent(sample.confidence)}<br>{page.text(sample.predicted)}"
    truth = "" if right else f"<br>is {page.text(sample.true)}"
    return (
        f'<figure class="{"right" if right else "wrong"}"><img alt="" src="{figures.thumbnail_uri(sample.image)}">'
        f"<figcaption>{taken}{truth}</figcaption></figure>"
    )
