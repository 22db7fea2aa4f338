"""A run on one page: a report.html that needs no other file, no network and no script."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from typing import Any, NamedTuple

from torch import Tensor

from vitfn import figures, tree
from vitfn.errors import InputError
from vitfn.files import replacing
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
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d5dae0; --ground: #fff; --panel: #f5f7f9;
  --wrong: #b3400a; --right: #00669e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a2abb6; --line: #3a424c; --ground: #14171b; --panel: #1d2228; --wrong: #ff9a5c;
    --right: #6cc0f5 }
  .picture { filter: invert(1) hue-rotate(180deg) } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1160px; margin: auto; padding: 1.5rem 1rem 3rem }
h1 { margin: 0; overflow-wrap: anywhere } h2 { margin: 2rem 0 .6rem; font-size: 1.15rem } p { margin: .2rem 0 }
img { display: block; width: 100%; height: auto }
.soft, figcaption, th, dt { color: var(--soft) }
.note { padding: .6rem .8rem; border-left: 4px solid var(--wrong); background: var(--panel) }
.numbers { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0 }
.numbers div { flex: 1 1 9rem; padding: .6rem .8rem; background: var(--panel); border-radius: 6px }
.numbers dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums }
.numbers small { display: block; font-size: .85rem }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem }
.pair > * { min-width: 0 }
.table { max-height: 27rem; overflow: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line) }
th { position: sticky; top: 0; background: var(--ground); font-weight: 600 }
td:first-child, .words td { overflow-wrap: anywhere; min-width: 5.2rem }
th:first-child, td:first-child, .words td, .words th { text-align: left }
@media (max-width: 30rem) { table { font-size: .85rem } th, td { padding-right: .4rem } }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem }
.samples figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: 6px; break-inside: avoid }
.samples .wrong { border: 2px dashed var(--wrong) } .wrong b { color: var(--wrong) } .right b { color: var(--right) }
.samples img { height: 7.5rem; object-fit: contain }
figcaption { margin-top: .4rem; font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere }
pre { margin: 0; padding: .8rem; background: var(--panel); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: all }
@media print { body { font-size: 11px } .table { max-height: none; overflow: visible } tr, img { break-inside: avoid }
  h2 { break-after: avoid } .pair { grid-template-columns: 1fr 1fr } }
"""


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
    name, notes = _text(config.get("name") or "report"), _failures(config)

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
            + _table(("true", "predicted", "images"), most_confused(counts, class_names), "words")
        )
    order = sorted(samples, key=lambda sample: (sample.true == sample.predicted, -sample.confidence))
    gallery = "".join(picture(partial(_sample, sample)) for sample in order)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{name}</title><style>{_STYLE}</style></head><body><main>
<h1>{name}</h1><p class="soft">{_text(_subtitle(config))}</p>
{"".join(f'<p class="note">{_text(note)}</p>' for note in dict.fromkeys(notes))}
<dl class="numbers">{_numbers(rows, predictions, len(class_names))}</dl>
{_columns(pictures)}{_columns(tables)}
{f'<h2>Samples, mistakes first</h2><div class="samples">{gallery}</div>' if gallery else ""}
<h2>Command</h2><pre>{escape(command)}</pre>
{_columns(_settings(title, config[key]) for key, title in _SETTINGS.items() if config.get(key))}
</main></body></html>
"""
    with replacing(path) as file:
        file.write(page.encode(errors="replace"))


def _text(value: Any) -> str:
    """Anything as text of the page: no markup, nothing that cannot be seen."""
    return escape("".join(c if c.isprintable() else "?" for c in str(value)))


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="table"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _columns(parts: Iterable[str]) -> str:
    return '<div class="pair">' + "".join(f"<div>{part}</div>" for part in parts if part) + "</div>"


def _settings(title: str, values: dict[str, Any]) -> str:
    return f"<h2>{title}</h2>" + _table(("name", "value"), tree.flatten(values).items(), "words")


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
    return _table(("class", "images", "right", "recall", "precision", "F1"), cells)


def _sample(sample: Sample) -> str:
    right = sample.true == sample.predicted
    taken = f"<b>{'✓ right' if right else '✗ wrong'}</b> {_percent(sample.confidence)}<br>{_text(sample.predicted)}"
    truth = "" if right else f"<br>is {_text(sample.true)}"
    return (
        f'<figure class="{"right" if right else "wrong"}"><img alt="" src="{figures.thumbnail_uri(sample.image)}">'
        f"<figcaption>{taken}{truth}</figcaption></figure>"
    )
