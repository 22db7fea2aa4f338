"""Evaluates a run or a file of weights: python -m vitfn.evaluate output/quickstart [--out=DIR]

MODEL is a run's directory, whose flags say what it is evaluated on where they are not given here, or a file of weights.
Prints accuracy, top-5 accuracy, loss, calibration error and the classes that go worst, and writes them to --out with
the confusion matrix.
"""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from absl.flags import FlagValues
from torch import Tensor
from tqdm import tqdm

from vitfn import device, figures, flags, metrics, recipe, tree, weights
from vitfn.command import run_command
from vitfn.config import ViTConfig
from vitfn.data import Files, Split
from vitfn.data.augment import normalise
from vitfn.data.batches import evaluation_batches
from vitfn.data.crops import resize
from vitfn.data.dataset import joined
from vitfn.errors import InputError
from vitfn.eval_step import make_eval_step
from vitfn.files import replacing
from vitfn.metrics import Predictions
from vitfn.parallel import ALONE, Ranks
from vitfn.tree import Tree

_WORST = 5  # classes that are printed
_SHOWN = 300  # characters of class names that an error shows


def evaluate(
    eval_step: Callable[[Tree, tuple[Tensor, Tensor]], dict[str, Tensor]],
    params: Tree,
    split: Split | Files,
    config: ViTConfig,
    batch_size: int,
    *,
    fit: Callable[[Tensor], Tensor] | None = None,
    workers: int = 0,
    on_bad: str = "fail",
    ranks: Ranks = ALONE,
) -> tuple[Predictions, Tensor]:
    """What the model says of every image of a split, each once, and their places in it (N,), on the CPU.

    `fit` makes (B, C, H, W) pixels of the model's size; by default the sides are resized independently, as Google does.
    Several `ranks` evaluate a part each, and all get the whole.
    """
    share, largest = split.part(*ranks.span(split.size)), -(-split.size // ranks.count)
    where, batch_size = tree.leaves(params)[0].device, max(1, min(batch_size, largest))
    batches = evaluation_batches(
        share,
        fit or (lambda images: resize(images, config.image_hw)),
        batch_size=batch_size,
        device=where,
        workers=workers,
        on_bad=on_bad,
    )
    found: list[dict[str, Tensor]] = []  # of each batch, on the device
    count = -(-largest // batch_size)  # in every process, since together they may gather the parameters

    def padding() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            images = torch.zeros(batch_size, config.channels, *config.image_hw, device=where)
            yield images, split.labels.new_full((batch_size, *split.labels.shape[1:]), -1, device=where)

    bar = {"desc": "evaluating", "total": count, "unit": "batch", "delay": 2, "leave": False}
    for images, labels in tqdm(islice(chain(batches, padding()), count), disable=not ranks.first, **bar):
        of_each = eval_step(params, (normalise(images, config, donate=True), labels))
        found.append({"labels": labels} | {name: value for name, value in of_each.items() if value.ndim})
    names = found[0] if found else ()
    own = {name: torch.cat([batch[name] for batch in found]).cpu()[: share.size] for name in names}
    parts = [part for part in ranks.gather(own) if part]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # (N, ...)
    labels = whole["labels"]
    real: Tensor = torch.ge(labels if labels.ndim == 1 else labels[:, 0], 0)
    if not real.any():
        raise InputError(f"evaluation: found no image that can be read among {split.size:,}, expected at least one")
    top5 = whole["top5"][real] if "top5" in whole else None
    losses, predicted, confidence = (whole[name][real] for name in ("losses", "predicted", "confidence"))
    return Predictions(labels[real], losses, predicted, confidence, top5), real.nonzero()[:, 0]


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    groups = (flags.evaluate_flags, flags.data_flags, flags.crop_flags, flags.device_flags)
    return run_command(command, argv, *groups, arguments=("MODEL",))


def command(fv: FlagValues, model: str) -> None:
    """The command."""
    path, run = weights.find(model)
    recipe.take(fv, run)
    recipe.check_eval_crop(fv)
    described, preprocessing, _ = weights.details(path)
    row = device.find(fv.device)
    precision = device.resolved_precision(row, fv.precision)
    dataset = recipe.dataset(fv, described.config.channels, run.get("seed", 42))
    config = described.config
    chosen = joined(dataset) if fv.split == "all" else getattr(dataset, fv.split)
    if dataset.test.channels != config.channels:
        found = f"{dataset.test.channels} channels in the images of {fv.dataset}"
        raise InputError(f"{path}: found {found}, expected the model's {config.channels}")
    split, class_names = _labelled_as(chosen, dataset.class_names, described.class_names, config, path)
    several = split.labels.ndim == 2
    eval_step = make_eval_step(
        config,
        precision=precision,
        compile=fv.compile,
        compile_fallback=fv.compile_fallback,
        loss=recipe.loss(run.get("loss"), several),
    )
    predictions, _ = evaluate(
        eval_step,
        tree.to(weights.load(path), row.name),
        split.to(row.name),
        config,
        fv.eval_batch_size,
        fit=recipe.fit_for_evaluation(fv, config, preprocessing),
        workers=fv.num_workers,
        on_bad=fv.bad_images,
    )
    measures = metrics.measures(predictions)
    out = Path(fv.out) if fv.out else Path(model) / "evaluation" if Path(model).is_dir() else None
    if out:
        _write(out, path, fv, measures, predictions, class_names)
    print("\n".join(f"{name:<22} {value}" for name, value in _summary(path, measures, len(class_names), out).items()))
    print("\n".join(_worst(predictions, class_names)))


def _labelled_as(
    split: Split | Files, classes: tuple[str, ...], names: tuple[str, ...] | None, config: ViTConfig, path: str
) -> tuple[Split | Files, tuple[str, ...]]:
    """A split labelled by `classes` with the labels of the model, by its classes' `names` where the file has them."""
    if names is None:
        if len(classes) != config.num_classes:
            found = f"{len(classes)} classes in the dataset"
            raise InputError(f"{path}: found {found}, expected the model's {config.num_classes}")
        return split, classes
    if unknown := [name for name in classes if name not in names]:
        known = ", ".join(names)
        expected = f"one of the model's: {known[:_SHOWN]}{', ...' if known[_SHOWN:] else ''}"
        raise InputError(f"{path}: found the class {unknown[0]!r} in the dataset, expected {expected}")
    if names != classes:
        places = torch.tensor([names.index(name) for name in classes])
        if split.labels.ndim == 1:
            labels = places[split.labels]
        else:
            labels = split.labels.new_zeros(len(split.labels), len(names))
            labels[:, places] = split.labels
        split = split._replace(labels=labels)
    return split, names


def _write(
    out: Path, path: str, fv: FlagValues, measures: dict[str, float], p: Predictions, class_names: tuple[str, ...]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    what = {name: fv[name].value for name in ("dataset", "data_dir", "eval_crop", "eval_interpolation")}
    numbers = {name: value if math.isfinite(value) else None for name, value in measures.items()}  # JSON has no NaN
    with replacing(out / "evaluation.json") as file:
        file.write(json.dumps({"model": path, **what, **numbers}, indent=2).encode() + b"\n")
    metrics.write_per_class_csv(out / "per_class.csv", metrics.per_class(p, class_names))
    if p.multi_label:
        return
    confusion = metrics.confusion(p, len(class_names))
    metrics.write_confusion_csv(out / "confusion.csv", confusion, class_names)
    try:
        figures.save(figures.confusion_figure(confusion, class_names), out / "confusion.png")
        figures.save(figures.reliability_figure(p), out / "calibration.png")
    except InputError as error:
        logging.getLogger("vitfn").warning("no pictures: %s", error)


def _summary(path: str, measures: dict[str, float], num_classes: int, out: Path | None) -> dict[str, str]:
    rows = {
        "model": path,
        "accuracy": f"{measures['accuracy']:.2%} ({measures['correct']:.0f} of {measures['count']:.0f})",
        "loss": f"{measures['loss']:.4f}",
    }
    if "top5" in measures and num_classes > 5:
        rows["top-5 accuracy"] = f"{measures['top5']:.2%}"
    for name in ("calibration_error", "mean_average_precision"):
        if name in measures:
            rows[name.replace("_", " ")] = f"{measures[name]:.4f}"
    return rows | ({"files": str(out)} if out else {})


def _worst(p: Predictions, class_names: tuple[str, ...]) -> list[str]:
    rows = [row for row in metrics.per_class(p, class_names) if row.images]
    rows = sorted(rows, key=lambda row: row.recall or 0.0)[:_WORST]
    lines = [f"{row.name[:30]:<30} {row.right:>7} of {row.images:<7} {row.recall:.2%}" for row in rows]
    return ["", "the classes that go worst: right of all, recall", *lines]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
