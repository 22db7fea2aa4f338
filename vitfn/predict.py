"""What a model sees in images: python -m vitfn.predict MODEL IMAGES... [--top=5] [--format=jsonl]

MODEL is a run's directory or a file of weights; IMAGES are files, folders (all images in them, at any depth) and
patterns in quotes ('photos/**/*.jpg'). Prints the likeliest classes of each image with their probabilities, and
nothing else on stdout. A file that is no image is named on stderr and left out, and the exit code is then 1.
"""

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from absl.flags import FlagValues
from torch import Tensor
from tqdm import tqdm

from vitfn import device, flags, labels, recipe, tree, weights
from vitfn.command import EXIT_FAILED, run_command
from vitfn.config import ViTConfig
from vitfn.data import Files
from vitfn.data.augment import normalise
from vitfn.data.batches import Fit, evaluation_batches
from vitfn.data.folder import images_in
from vitfn.data.images import SUFFIXES
from vitfn.errors import InputError, printable
from vitfn.eval_step import make_predict_step
from vitfn.preprocessing import Preprocessing
from vitfn.tree import Tree


class Guess(NamedTuple):
    """A class that an image may be of: its number, its name, and how surely, 0 to 1."""

    label: int
    name: str
    probability: float


def image_files(given: Sequence[str]) -> tuple[str, ...]:
    """The image files that are given: files by name, those in folders at any depth, and those that patterns match.

    Raises InputError for a name that is none of these, and for folders without images.
    """
    found: list[str] = []
    for name in given:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise InputError(f"{name}: found no such file or folder, expected an image, a folder of them or a pattern")
        for match in matches:
            if not os.path.isdir(match):
                found.append(match)
            elif inside := images_in(Path(match), [""])[""]:
                found += inside
            else:
                raise InputError(f"{match}: found no images in this folder, expected {', '.join(SUFFIXES)}")
    return tuple(found)


def predict(
    predict_step: Callable[[Tree, tuple[Tensor]], Tensor],
    params: Tree,
    paths: tuple[str, ...],
    config: ViTConfig,
    batch_size: int,
    *,
    fit: Fit,
    workers: int = 0,
) -> Iterator[tuple[list[int], Tensor]]:
    """Batch by batch, the places in `paths` of the images that can be read, and their probabilities (n, K) on the CPU.

    `fit` makes (B, C, H, W) pixels of the model's size. What cannot be read is warned of.
    """
    batches = -(-len(paths) // batch_size)
    batch_size = -(-len(paths) // batches)  # even batches, of which the last lacks less
    where = tree.leaves(params)[0].device
    files = Files(paths, torch.arange(len(paths)), config.channels)
    read = evaluation_batches(files, fit, batch_size=batch_size, device=where, workers=workers, on_bad="skip")
    for images, places in tqdm(read, total=batches, desc="predicting", unit="batch", delay=2, leave=False):
        probabilities = predict_step(params, (normalise(images, config, donate=True),))
        real = places >= 0
        yield places[real].tolist(), probabilities[real].cpu()


def likeliest(probabilities: Tensor, names: Sequence[str], top: int) -> list[Guess]:
    """The `top` likeliest classes of an image's probabilities (K,), the likeliest first."""
    values, classes = probabilities.topk(min(top, len(names)))
    return [Guess(i, names[i], p) for p, i in zip(values.tolist(), classes.tolist(), strict=True)]


def _as_table(path: str, guesses: list[Guess], width: int) -> str:
    shown = [printable(path), *[""] * (len(guesses) - 1)]
    return "".join(
        f"{cell:<{width}}  {guess.probability:7.2%}  {printable(guess.name)}\n"
        for cell, guess in zip(shown, guesses, strict=True)
    )


def _as_csv(path: str, guesses: list[Guess]) -> str:
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(
        (path, rank, guess.name, guess.label, f"{guess.probability:.6f}") for rank, guess in enumerate(guesses, 1)
    )
    return text.getvalue()


def _as_json_line(path: str, guesses: list[Guess]) -> str:
    classes = [{"class": g.name, "label": g.label, "probability": round(g.probability, 6)} for g in guesses]
    return json.dumps({"image": path, "classes": classes}) + "\n"


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    groups = (flags.predict_flags, flags.labels_flags, flags.crop_flags, flags.device_flags, _not_compiled)
    return run_command(command, argv, *groups, arguments=("MODEL", "IMAGES..."))


def _not_compiled(fv: FlagValues) -> None:
    """A few images are there before anything is compiled, and many take little longer."""
    fv.set_default("compile", "off")


class Classifier(NamedTuple):
    """MODEL's file, what is in it, whether its classes do not exclude each other, as its run says, and how its images
    are made, if that is said beside its flags."""

    path: str
    config: ViTConfig
    names: tuple[str, ...]
    multi_label: bool
    preprocessing: Preprocessing | None


def classifier(fv: FlagValues, model: str, needs_head: bool = True) -> Classifier:
    """The classifier MODEL, whose run's flags decide on the crop unless they are given."""
    path, run = weights.find(model)
    recipe.take(fv, {name: run[name] for name in ("eval_crop", "eval_interpolation") if name in run})
    recipe.check_eval_crop(fv)
    described, preprocessing, _ = weights.details(path)
    if needs_head and not described.config.num_classes:
        raise InputError(f"{path}: found a model without a head, expected one that tells classes apart")
    names = labels.class_names(described, path, fv.labels)
    multi_label = run.get("resolved", {}).get("loss") == "sigmoid"
    return Classifier(path, described.config, names, multi_label, preprocessing)


def command(fv: FlagValues, model: str, *images: str) -> int:
    """The command."""
    path, config, names, multi_label, preprocessing = classifier(fv, model)
    paths = image_files(images)
    row = device.find(fv.device)
    predict_step = make_predict_step(
        config,
        precision=device.resolved_precision(row, fv.precision),
        compile=fv.compile,
        compile_fallback=fv.compile_fallback,
        multi_label=multi_label,
    )
    params = tree.to(weights.load(path), row.name)
    shown: dict[str, Callable[..., str]] = {
        "table": partial(_as_table, width=max(map(len, paths))),
        "csv": _as_csv,
        "jsonl": _as_json_line,
    }
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # file names are bytes
    if fv.format == "csv":
        print("image,rank,class,label,probability")
    fit, read = recipe.fit_for_evaluation(fv, config, preprocessing), 0
    workers = min(fv.num_workers, len(paths) // 8)  # to start them takes longer than to read a few
    for places, each in predict(predict_step, params, paths, config, fv.batch_size, fit=fit, workers=workers):
        texts = (shown[fv.format](paths[i], likeliest(p, names, fv.top)) for i, p in zip(places, each, strict=True))
        tqdm.write("".join(texts), file=sys.stdout, end="")  # beside the bar
        read += len(places)
    return 0 if read == len(paths) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv))
