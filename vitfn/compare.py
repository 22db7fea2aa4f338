"""Compares two loss curves, A the reference and B the candidate: python -m vitfn.compare A B [--plot=loss.png]

A curve is a run's directory or its metrics.jsonl, `file.csv:column`, or a log: the vendor's (train.loss : X), or the
seed's progress bar (loss=X). The ModelZoo's own verdict is by signed means, in which errors cancel and any curve below
the reference passes; it is printed as its loss.py prints it, and beneath it what it hides, with a verdict of our own.
"""

import csv
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from absl.flags import FlagValues

from vitfn import flags
from vitfn.command import run_command
from vitfn.errors import InputError

_NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
_LOGS = {  # the first pattern that is in a text is the text's
    "the vendor's log": re.compile(rf"rank : 0  train\.loss : {_NUMBER}"),
    "a progress bar": re.compile(rf"\((\d+) / \d+ Steps\) \(loss={_NUMBER}\)"),
    "a log": re.compile(rf"\bloss[ :=]+{_NUMBER}"),
}
_ENDS = 20  # steps at the beginning and at the end that are looked at by themselves


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code: 1 where the curves are further apart than --limit."""
    return run_command(compare, argv, flags.compare_flags, arguments=("A", "B"))


@np.errstate(divide="ignore", invalid="ignore")  # a loss of 0 or nan is for the figures to show
def compare(fv: FlagValues, reference: str, candidate: str) -> int:
    """The command."""
    a, b = read_curve(reference), read_curve(candidate)
    steps = min(len(a), len(b))
    if len(a) != len(b):
        print(f"{len(a)} and {len(b)} steps: the first {steps} are compared")
    a, b = a[:steps], b[:steps]
    print("\n".join([*vendor_verdict(a, b), "", *what_it_hides(a, b, fv.limit)]))
    if fv.plot:
        plot(fv.plot, a, b)
    return 0 if mean_relative_error(a, b) <= fv.limit else 1


def read_curve(source: str) -> np.ndarray:
    """The loss of each step, float64 (N,). Raises InputError where there is none."""
    path, _, column = source.rpartition(":") if re.search(r"\.csv:[^:/\\]+$", source) else (source, "", "")
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{file}: expected a loss curve, found: {error.strerror}") from None
    try:
        losses = _column(text, column) if column else _lines(text) if file.suffix == ".jsonl" else _log(text)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{source}: expected a loss curve, found: {error}") from None
    if not losses:
        raise InputError(f"{source}: expected a loss curve, found no loss")
    return np.array(losses, np.float64)


def _column(text: str, column: str) -> list[float]:
    rows = list(csv.DictReader(text.splitlines()))
    if rows and column not in rows[0]:
        raise ValueError(f"the columns {', '.join(rows[0])}")
    return [float(row[column]) for row in rows]


def _lines(text: str) -> list[float]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [math.nan if row["train/loss"] is None else float(row["train/loss"]) for row in rows if "train/loss" in row]


def _log(text: str) -> list[float]:
    for pattern in _LOGS.values():
        if found := pattern.findall(text):
            if isinstance(found[0], tuple):  # a bar is drawn several times a step
                return list({int(step): float(loss) for step, loss in found}.values())
            return [float(loss) for loss in found]
    return []


def vendor_verdict(a: np.ndarray, b: np.ndarray) -> list[str]:
    """What the ModelZoo's loss.py prints: signed means."""
    relative, absolute = float(((b - a) / a).mean()), float((b - a).mean())
    rule = ("mean_relative_error", relative) if relative <= absolute else ("mean_absolute_error", absolute)
    passed = "pass" if relative <= 0.05 or absolute <= 0.0002 else "fail"
    return [
        f"MeanRelativeError: {relative}",
        f"MeanAbsoluteError: {absolute}",
        f"Rule,{rule[0]} {rule[1]}",
        f"{passed} mean_relative_error={relative} <= 0.05 or mean_absolute_error={absolute} <= 0.0002",
    ]


def mean_relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """The mean of |b - a| / |a|; infinite where a loss is not finite."""
    error = np.abs(b - a) / np.abs(a)
    return float(error.mean()) if np.isfinite(error).all() else math.inf


def what_it_hides(a: np.ndarray, b: np.ndarray, limit: float) -> list[str]:
    """The unsigned errors, where the largest is, and whether the mean is within the limit."""
    error = np.abs(b - a) / np.abs(a)
    worst = int(np.nanargmax(error)) if np.isfinite(error).any() else 0
    mean = mean_relative_error(a, b)
    below = float((b < a).mean())
    lines = [
        ("unsigned mean relative error", f"{mean:.7f}"),
        ("unsigned mean absolute error", f"{np.abs(b - a).mean():.7f}"),
        ("largest relative error", f"{error[worst]:.7f} at step {worst} (A {a[worst]:.6f}, B {b[worst]:.6f})"),
        (f"first {min(_ENDS, len(a))} steps", f"{mean_relative_error(a[:_ENDS], b[:_ENDS]):.7f}"),
        (f"last {min(_ENDS, len(a))} steps", f"{mean_relative_error(a[-_ENDS:], b[-_ENDS:]):.7f}"),
        ("steps where B is below A", f"{below:.1%}"),
        ("verdict", f"{'within' if mean <= limit else 'BEYOND'} the limit of {limit:g} unsigned mean relative error"),
    ]
    return [f"{name:<30} {value}" for name, value in lines]


def plot(path: str, a: np.ndarray, b: np.ndarray) -> None:
    """Both curves, and their relative difference below, as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib; install it with: pip install matplotlib") from None
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    above.plot(a, label="A, the reference", color="tab:blue")
    above.plot(b, label="B", color="tab:orange", linestyle="--")
    above.set_ylabel("loss")
    above.legend()
    below.plot((b - a) / np.abs(a), color="tab:gray")
    below.axhline(0, color="black", linewidth=0.5)
    below.set_ylabel("(B - A) / |A|")
    below.set_xlabel("step")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot={path}: expected a path of a picture, found: {error}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
