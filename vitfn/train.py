"""Trains a Vision Transformer on images: python -m vitfn.train --flagfile=flags/quickstart.flags"""

import dataclasses
import json
import logging
import platform
import shlex
import sys
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from absl.flags import FlagValues

from vitfn import (
    __version__,
    device,
    flags,
    flops,
    losses,
    meshes,
    optim,
    parallel,
    recipe,
    rng,
    snapshot,
    summary,
    tree,
    vit,
    weights,
)
from vitfn.command import run_command
from vitfn.config import ViTConfig
from vitfn.data import Files, Split
from vitfn.data.augment import augment, crop
from vitfn.data.batches import training_batches
from vitfn.errors import InputError, few
from vitfn.eval_step import make_eval_step
from vitfn.evaluate import evaluate
from vitfn.fit import Job, Plan, fit
from vitfn.logits import PRECISIONS
from vitfn.meshes import Mesh
from vitfn.metrics import measures
from vitfn.parallel import Ranks
from vitfn.run import RunDirectory
from vitfn.step import Batch, TrainState, grad_and_value, make_train_step
from vitfn.tree import Tree

# Flags that a resumed run may change: where things are, what is shown of them, and what changes no number.
_FREE = ("help", "h", "flagfile", "resume", "output_dir", "data_dir", "download", "num_workers", "keep_checkpoints",
         "checkpoint_every", "report", "tensorboard", "tcap_log", "mesh", "placement", "timeout",
         "remat")  # fmt: skip
log = logging.getLogger("vitfn")


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return run_command(train, argv, *flags.TRAIN)


def train(fv: FlagValues) -> int:
    """The command: everything that can be wrong with the input shows before the run directory is made."""
    if not fv.name or fv.name in (".", "..") or Path(fv.name).name != fv.name:
        raise InputError(f"--name: found {fv.name or 'none'}, expected a name for the run's folder in --output_dir")
    ranks = parallel.from_environment(fv.local_rank)
    if not ranks.first:
        log.setLevel(logging.ERROR)  # one process tells
    row = device.find(fv.device)
    recipe.check(fv, row, ranks.count)
    with parallel.joined(ranks, row, fv.timeout) as ranks:
        return _train(fv, row, meshes.make(fv.mesh, fv.placement, ranks, row.name))


def _train(fv: FlagValues, row: device.Device, mesh: Mesh) -> int:
    ranks = mesh.ranks
    # torchrun starts all processes anew when one is lost; only what this very job made or resumed is gone on with
    made_here = f"vitfn/made/{(Path(fv.output_dir) / fv.name).absolute()}"
    resume = fv.resume or ranks.remembers(made_here)
    directory = RunDirectory(
        fv.output_dir,
        fv.name,
        resume=resume,
        keep=fv.keep_checkpoints,
        tensorboard=fv.tensorboard,
        ranks=ranks,
    )
    settings = {name: value for name, value in fv.flag_values_dict().items() if name not in ("help", "h", "flagfile")}
    _check_unchanged(directory, settings)
    pretrained = weights.details(fv.pretrained_dir) if fv.pretrained_dir else None
    config = recipe.model(fv, pretrained.description.config if pretrained else None)
    with ranks.first_alone():  # it may download
        dataset = recipe.dataset(fv, fv.channels, fv.seed)
    if (found := fv.train_batch_size) > (size := dataset.train.size):
        raise InputError(f"--train_batch_size: found {found}, expected at most the {size} images of {fv.dataset}")
    config = recipe.for_data(config, len(dataset.class_names), dataset.train.channels)
    training, testing = dataset.train.to(row.name), dataset.test.to(row.name)
    precision = device.resolved_precision(row, fv.precision)
    remat = recipe.remat(fv, row, config, precision, mesh)  # before the parameters take of what is free
    params = _starting_params(fv, config, mesh)
    optimizer = recipe.optimizer(fv, config)
    loss = recipe.loss(fv.loss, dataset.train.labels.ndim == 2)
    shared: dict[str, Any] = {
        "precision": precision,
        "compile_fallback": fv.compile_fallback,
        "loss": loss,
        "mesh": mesh,
    }
    train_step = make_train_step(
        config,
        optimizer,
        max_grad_norm=fv.max_grad_norm,
        compile=fv.compile,
        seed=fv.seed,
        label_smoothing=fv.label_smoothing,
        accumulation_steps=fv.gradient_accumulation_steps,
        loss_scale=fv.loss_scale,
        remat=remat,
        **shared,
    )
    eval_step = make_eval_step(config, compile=fv.compile, **shared)
    state, parameters = TrainState(0, params, optimizer.init(mesh.updated(params))), tree.size(params)
    notes: dict[str, Any] = {"rng": rng.VERSION}  # what a checkpoint knows beside the state
    del params  # the state has them, until it is donated
    predictions: list[Any] = []  # the last evaluation's, and where its images are

    def after_first_step() -> None:
        nonlocal eval_step  # in the form that works, so that one that fails is tried and reported once
        eval_step = make_eval_step(config, compile=train_step.form or fv.compile, **shared)
        describe_run()

    def evaluate_now(state: TrainState) -> dict[str, float]:
        predictions[:] = evaluate(
            eval_step,
            mesh.of_parameters(optim.averaged(state.params, state.opt_state)),
            testing,
            config,
            fv.eval_batch_size,
            fit=recipe.fit_for_evaluation(fv, config),
            workers=fv.num_workers,
            on_bad=fv.bad_images,
            ranks=ranks,
        )
        return measures(predictions[0])

    def save_now(path: Path, leaves: Tree) -> None:
        found, model = vit.shapes(config), (config, dataset.class_names)
        weights.save_leaves(path, mesh.wholes(leaves), found, *model, writes=ranks.first)

    def save_best(state: TrainState) -> Any:
        weights_now = optim.averaged(state.params, state.opt_state)
        if mesh.shards == 1:  # nothing is cut: the first process can write it later
            weights_now = snapshot.on_cpu(weights_now) if ranks.first else {}
            return lambda: weights.save_npz(directory.best_path, weights_now, config, dataset.class_names)
        save_now(directory.best_path, weights_now)
        return None

    def describe_run() -> None:
        steps = {"train": train_step, "eval": eval_step}
        compiled = {name: {"form": step.form, "failures": step.failures} for name, step in steps.items()}
        directory.write_config(
            settings
            | {
                "command": shlex.join(["python", "-m", "vitfn.train", *sys.argv[1:]]),
                "changed": {name: value for name, value in settings.items() if value != fv[name].default},
                "model": dataclasses.asdict(config) | {"parameters": parameters},
                "resolved": {
                    "device": row.name,
                    "precision": precision,
                    "remat": remat,
                    "loss": recipe.loss_name(fv.loss, dataset.train.labels.ndim == 2),
                    "compile": compiled,
                    "processes": ranks.count,
                    "mesh": f"data={mesh.copies},shard={mesh.shards}",
                    "device_batch_size": fv.train_batch_size // ranks.count,
                    **device.facts(row),
                },
                "versions": {"vitfn": __version__, "torch": torch.__version__, "python": platform.python_version()},
            }
        )

    _warn(fv, pretrained.assumed if pretrained else "")
    ranks.remember(made_here)
    with directory:
        if saved := directory.snapshots.latest(state) if resume else None:
            state, notes = saved
            if int(state.step) < fv.num_steps:  # one that has ended draws nothing more
                _check_random_numbers(directory, notes)
            log.info("going on after step %d", int(state.step))
        notes["model"] = {"config": dataclasses.asdict(config), "class_names": dataset.class_names}
        if not (finished := int(state.step) == fv.num_steps > 0):
            describe_run()
        job = Job(
            partial(_batches, fv, training, config, row.name, ranks),
            train_step,
            after_first_step,
            evaluate_now,
            save_best,
            partial(_explain, config=config, loss=loss, mesh=mesh),
            _utilisation(config, optimizer, row.name, precision) if fv.num_steps else lambda rate: None,
        )
        epoch_steps = dataset.train.size / fv.train_batch_size
        plan = Plan(fv.num_steps, fv.eval_every, fv.checkpoint_every, epoch_steps, fv.tcap_log)
        outcome = fit(directory, job, state, notes, plan, ranks)
        if outcome.stopped:
            return 128 + outcome.stopped
        if not finished:
            describe_run()
        final = optim.averaged(outcome.state.params, outcome.state.opt_state)
        if fv.num_steps:
            save_now(directory.model_path, final)
        # killed before it was written
        if fv.report and not predictions and not ranks.max(directory.report_path.exists()):
            evaluate_now(outcome.state)
        if fv.report and predictions and ranks.first:
            summary.write_report(directory, dataset, *predictions)
    if ranks.first:
        print(summary.table(directory, dataset, outcome, device.peak_memory(row)))
    return 0


def _batches(
    fv: FlagValues, split: Split | Files, config: ViTConfig, where: str, ranks: Ranks, start: int
) -> Generator[Batch, None, None]:
    """This process's shares of the augmented batches of the updates numbered from `start`."""
    augmentation = recipe.augmentation(fv)
    places = torch.arange(*ranks.span(fv.train_batch_size))
    if mixed := ranks.count > 1 and bool(augmentation.mixup or augmentation.cutmix):  # with the image before
        places = torch.cat([(places[:1] - 1) % fv.train_batch_size, places])
    cropped = training_batches(
        split,
        partial(crop, config_size=config.image_hw, augmentation=augmentation),
        batch_size=fv.train_batch_size,
        seed=fv.seed,
        start=start,
        stop=fv.num_steps,
        device=where,
        places=places,
        workers=fv.num_workers,
        on_bad=fv.bad_images,
    )
    for step, batch in enumerate(cropped, start):
        images, labels = augment(
            *batch, config, seed=fv.seed, step=step, augmentation=augmentation, places=places, donate=True
        )
        yield images[mixed:], labels[mixed:]


def _check_unchanged(directory: RunDirectory, settings: dict[str, Any]) -> None:
    """Refuses to resume a run with other flags than it was begun with."""
    if not (begun := directory.read_config()):
        return
    now = json.loads(json.dumps(settings))
    changed = [name for name in now if name not in _FREE and name in begun and now[name] != begun[name]]
    if changed:
        given, had = (" ".join(f"--{name}={values[name]}" for name in changed) for values in (now, begun))
        raise InputError(f"--resume: found {given}, expected what the run was begun with: {had}")
    if (version := begun.get("versions", {}).get("torch")) != torch.__version__:
        log.warning("the run was begun with torch %s, this is %s: its bits may differ", version, torch.__version__)


def _check_random_numbers(directory: RunDirectory, notes: dict[str, Any]) -> None:
    """Refuses to go on with other random numbers than a run was begun with: its masks and batches would be others."""
    if (found := notes.get("rng", 1)) != rng.VERSION:
        weights_there = best if (best := directory.best_path).exists() else directory.snapshots.files()[0]
        raise InputError(
            f"--resume: found a run with random numbers of version {found}, expected {rng.VERSION}: finish it with the "
            f"vitfn that began it, or start a new run from its weights with --pretrained_dir={weights_there}"
        )


def _warn(fv: FlagValues, assumed: str) -> None:
    if assumed:
        log.warning("%s: does not state its config; assumed %s", fv.pretrained_dir, assumed)
    if 0 < fv.num_steps < fv.warmup_steps:
        log.warning(
            "--warmup_steps=%d exceeds --num_steps=%d: the rate never reaches its peak", fv.warmup_steps, fv.num_steps
        )
    if fv["fp16_opt_level"].present:
        meaning = "autocast with float32 weights" if fv.fp16 else "nothing without --fp16"
        log.info("--fp16_opt_level=%s means %s", fv.fp16_opt_level, meaning)


def _starting_params(fv: FlagValues, config: ViTConfig, mesh: Mesh) -> Tree:
    if not fv.pretrained_dir:
        return vit.init(config, fv.seed, mesh.place)
    params = mesh.placed(weights.load(fv.pretrained_dir, config, mesh.place if mesh.shards > 1 else None))
    if fv.head == "zero" and fv.num_steps:
        params["head"] = tree.map(torch.zeros_like, params["head"])
    return params


def _utilisation(config: ViTConfig, optimizer: optim.Optimizer, where: str, precision: str) -> Any:
    """The share of the device's own matrix products that training makes use of; None where it is not known."""
    if config.resnet or optimizer.rules.frozen:
        return lambda images_per_second: None
    peak = flops.measured_peak(where, PRECISIONS[precision] or torch.float32)
    return lambda images_per_second: 3 * flops.forward_flops(config) * images_per_second / peak


def _explain(state: TrainState, batch: Batch, config: ViTConfig, loss: losses.Loss, mesh: Mesh) -> str:
    """Which leaves are not finite, or too large for a norm: parameters, or their gradients in float32, eagerly."""
    params = tree.map(mesh.whole, state.params)

    def named(leaves: Tree, what: str) -> str:
        bad = [path for path, leaf in tree.flatten(leaves).items() if not torch.linalg.vector_norm(leaf).isfinite()]
        return f"{what} of {few(bad)}" if bad else ""

    images, labels = batch
    grads, _ = grad_and_value(lambda params: loss(vit.apply(params, images, config), labels).mean())(params)
    return named(params, "parameters") or named(grads, "gradients") or "in float32 they are"


if __name__ == "__main__":
    parallel.leave(main(sys.argv))
