"""Trains a Vision Transformer on images: python -m vitfn.train --flagfile=flags/quickstart.flags"""

import dataclasses
import logging
import math
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from absl.flags import FlagValues

from vitfn import __version__, device, flags, optim, tree, vit, weights
from vitfn.config import ViTConfig, get_config
from vitfn.data import Dataset, load
from vitfn.data.augment import augment
from vitfn.data.batches import batch_indices
from vitfn.errors import InputError
from vitfn.evaluate import evaluate
from vitfn.run import Outcome, RunDirectory, fit
from vitfn.step import Batch, TrainState, make_eval_step, make_train_step
from vitfn.tree import Tree

log = logging.getLogger("vitfn")


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return flags.run_command(train, argv, flags.train_flags, flags.data_flags, flags.model_flags, flags.device_flags)


def train(fv: FlagValues) -> None:
    """The command: everything that can be wrong with the input shows before the run directory is made."""
    _check(fv)
    row = device.find(fv.device)
    directory = RunDirectory(fv.output_dir, fv.name)
    described = weights.describe(fv.pretrained_dir) if fv.pretrained_dir else None
    config = _config(fv, described.config if described else None)
    dataset = load(fv.dataset, fv.data_dir, fv.download)
    for flag, split in (("train_batch_size", dataset.train), ("eval_batch_size", dataset.test)):
        if (found := getattr(fv, flag)) > (count := len(split.labels)):
            raise InputError(
                f"--{flag}: found {found}, expected at most the {count} images that {fv.dataset} has for it"
            )
    channels = dataset.train.images.shape[1]
    config = dataclasses.replace(config, num_classes=len(dataset.class_names), channels=channels)
    params = tree.to(_starting_params(fv, config), row.name)
    precision = row.precision if fv.precision == "auto" else fv.precision
    optimizer = _optimizer(fv)
    train_step = make_train_step(
        config, optimizer, max_grad_norm=fv.max_grad_norm, precision=precision, compile=fv.compile, seed=fv.seed
    )
    eval_step = make_eval_step(config, precision=precision, compile=fv.compile)
    training, testing = dataset.train.to(row.name), dataset.test.to(row.name)

    def batch(step: int) -> Batch:
        index = batch_indices(len(training.labels), fv.train_batch_size, fv.seed, step).to(row.name, non_blocking=True)
        images = augment(training.images[index], config, seed=fv.seed, step=step, crop_min=fv.crop_min, flip=fv.flip)
        return images, training.labels[index]

    def after_first_step() -> None:
        nonlocal eval_step  # in the form that works, so that one that fails is tried and reported once
        eval_step = make_eval_step(config, precision=precision, compile=train_step.form or fv.compile)
        describe_run()

    def describe_run() -> None:
        steps = {"train": train_step, "eval": eval_step}
        compiled = {name: {"form": step.form, "failures": step.failures} for name, step in steps.items()}
        directory.write_config(
            {name: value for name, value in fv.flag_values_dict().items() if name not in flags.NOT_SETTINGS}
            | {
                "command": shlex.join(sys.argv),
                "model": dataclasses.asdict(config) | {"parameters": tree.size(params)},
                "resolved": {"device": row.name, "precision": precision, "compile": compiled},
                "versions": {"vitfn": __version__, "torch": torch.__version__, "python": platform.python_version()},
            }
        )

    if described and not described.stated:
        log.warning("%s: does not state its config; assumed %s", fv.pretrained_dir, weights.assumed(described.config))
    if 0 < fv.num_steps < fv.warmup_steps:
        log.warning(
            "--warmup_steps=%d exceeds --num_steps=%d: the rate never reaches its peak", fv.warmup_steps, fv.num_steps
        )
    with directory:
        describe_run()
        outcome = fit(
            directory,
            TrainState(0, params, optimizer.init(params)),
            train_step,
            batch,
            lambda params: evaluate(eval_step, params, testing, config, fv.eval_batch_size),
            num_steps=fv.num_steps,
            eval_every=fv.eval_every,
            after_first_step=after_first_step,
        )
        describe_run()
        if fv.num_steps:
            weights.save_npz(directory.model_path, outcome.params, config, dataset.class_names)
    _print_summary(
        fv, config, dataset, directory, outcome, f"{row.name}, {precision}, compile={train_step.form or eval_step.form}"
    )


def _check(fv: FlagValues) -> None:
    if not fv.name or fv.name in (".", "..") or Path(fv.name).name != fv.name:
        raise InputError(f"--name: found {fv.name or 'none'}, expected a name for the run's folder in --output_dir")
    if fv.fp16:
        if fv.precision not in ("auto", "float16"):
            raise InputError(f"--fp16 and --precision={fv.precision} contradict each other; expected one of them")
        fv["precision"].value = "float16"
    for name, accepted in (("gradient_accumulation_steps", (1,)), ("loss_scale", (0,)), ("local_rank", (-1, 0))):
        if (value := fv[name].value) not in accepted:
            raise InputError(
                f"--{name}: found {value}, which is not built yet; expected {' or '.join(map(str, accepted))}"
            )
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "crop_min"):
        if not math.isfinite(value := getattr(fv, name)):
            raise InputError(f"--{name}: found {value}, expected a finite number")
    if fv.max_grad_norm <= 0:
        raise InputError(f"--max_grad_norm: found {fv.max_grad_norm}, expected a number above 0")


def _config(fv: FlagValues, own: ViTConfig | None) -> ViTConfig:
    """The model by the flags, for any dataset; what they leave open is as in the file of weights, or else Google's."""
    overrides: dict[str, Any] = {"image_size": fv.img_size}
    if own:
        fields = ["gelu", "layer_norm_eps", "mean", "std", "posemb"]
        if not fv.model_type.endswith("-gap-norep"):
            fields.append("classifier")
        overrides |= {name: getattr(own, name) for name in fields}
    overrides |= {name: fv[name].value for name in ("gelu", "dropout_rate") if fv[name].value is not None}
    try:
        return get_config(fv.model_type, **overrides)
    except InputError as error:
        size = "x".join(map(str, fv.img_size)) if isinstance(fv.img_size, tuple) else fv.img_size
        raise InputError(f"--model_type={fv.model_type} --img_size={size}: {error}") from None


def _starting_params(fv: FlagValues, config: ViTConfig) -> Tree:
    if not fv.pretrained_dir:
        return vit.init(config, fv.seed)
    params = weights.load(fv.pretrained_dir, config)
    if fv.head == "zero" and fv.num_steps:
        params["head"] = tree.map(torch.zeros_like, params["head"])
    return params


def _optimizer(fv: FlagValues) -> optim.Optimizer:
    decay = optim.warmup_cosine if fv.decay_type == "cosine" else optim.warmup_linear
    make = optim.sgd if fv.optimizer == "sgd" else optim.adamw
    return make(decay(fv.learning_rate, fv.num_steps, fv.warmup_steps), weight_decay=fv.weight_decay)


def _print_summary(
    fv: FlagValues, config: ViTConfig, dataset: Dataset, directory: RunDirectory, outcome: Outcome, how: str
) -> None:
    metrics = outcome.metrics
    start = fv.pretrained_dir or "random weights"
    rows = {
        "model": f"{config.name}, {tree.size(outcome.params):,} parameters, from {start}",
        "data": f"{fv.dataset}, {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images",
        "device": how,
    }
    if fv.num_steps:
        others = (fv.num_steps - 1) * fv.train_batch_size / outcome.other_seconds if fv.num_steps > 1 else 0
        rows["steps"] = (
            f"{fv.num_steps:,} of {fv.train_batch_size} images; the first took {outcome.first_seconds:.1f} s, "
            f"the others {outcome.other_seconds:.1f} s ({others:.1f} images/s)"
        )
        rows["train loss"] = f"{metrics['train/loss']:.4f}"
    rows["test loss"] = f"{metrics['eval/loss']:.4f}"
    rows["test accuracy"] = (
        f"{metrics['eval/accuracy']:.2%} ({metrics['eval/correct']:.0f} of {metrics['eval/count']:.0f})"
    )
    rows["files"] = str(directory.path)
    for name, value in rows.items():
        print(f"{name:<14} {value}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
