"""What vitfn.bench measures: the steps and the training batches that flags ask for, on random weights and images."""

import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from absl.flags import FlagValues

from vitfn import device, flops, recipe, train, tree, vit
from vitfn.compile import CompiledStep
from vitfn.config import ViTConfig
from vitfn.eval_step import make_eval_step
from vitfn.logits import PRECISIONS
from vitfn.meshes import ONE
from vitfn.optim import Optimizer
from vitfn.parallel import ALONE
from vitfn.step import Batch, TrainState, make_train_step
from vitfn.timing import Call
from vitfn.tree import Tree


class Workload(NamedTuple):
    """A model and how it is trained, as flags say, on one device."""

    fv: FlagValues
    row: device.Device
    config: ViTConfig
    precision: str
    compile: str
    optimizer: Optimizer


def from_flags(fv: FlagValues) -> Workload:
    """Raises InputError for flags that are wrong or contradict each other."""
    row = device.find(fv.device)
    recipe.check(fv, row)
    config = recipe.model(fv, None)
    config = recipe.for_data(config, config.num_classes, fv.channels)
    precision = device.resolved_precision(row, fv.precision)
    return Workload(fv, row, config, precision, fv.compile, recipe.optimizer(fv, config))


def parameters(work: Workload) -> Tree:
    """Random ones on the device."""
    return tree.to(vit.init(work.config, work.fv.seed), work.row.name)


def random_batch(work: Workload, size: int) -> Batch:
    """Normal pixels and even labels on the device."""
    generator = torch.Generator().manual_seed(work.fv.seed)
    images = torch.randn(size, work.config.channels, *work.config.image_hw, generator=generator)  # (B, C, H, W)
    labels = torch.randint(work.config.num_classes, (size,), generator=generator)  # (B,)
    return images.to(work.row.name), labels.to(work.row.name)


def training(work: Workload, params: Tree, batch: Batch) -> tuple[Call, CompiledStep]:
    """A call that makes a train step, of a state that it keeps, and the step."""
    fv, optimizer = work.fv, work.optimizer
    step = make_train_step(
        work.config,
        optimizer,
        max_grad_norm=fv.max_grad_norm,
        precision=work.precision,
        compile=work.compile,
        compile_fallback=fv.compile_fallback,
        seed=fv.seed,
        loss=recipe.loss(fv.loss, several_labels=False),
        label_smoothing=fv.label_smoothing,
        accumulation_steps=fv.gradient_accumulation_steps,
        loss_scale=fv.loss_scale,
        remat=recipe.remat(fv, work.row, work.config, work.precision, ONE),
    )
    state = TrainState(0, params, optimizer.init(params))

    def call() -> torch.Tensor:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return call, step


def timed(optimizer: Optimizer) -> tuple[Optimizer, list[float]]:
    """The optimizer, whose updates wait for the device before and after, and the seconds of each, as they come.

    So nothing that is compiled as one graph can contain it.
    """
    found: list[float] = []

    def update(grads: Tree, opt_state: Tree, params: Tree, step: torch.Tensor, **how) -> tuple[Tree, Tree]:
        _wait(grads)
        start = time.perf_counter()
        params, opt_state = optimizer.update(grads, opt_state, params, step, **how)
        _wait(params)
        found.append(time.perf_counter() - start)
        return params, opt_state

    return Optimizer(optimizer.init, update, optimizer.schedule, optimizer.rules), found


def _wait(leaves: Tree) -> None:
    tree.leaves(leaves)[-1].flatten()[0].item()


def evaluating(work: Workload, params: Tree, batch: Batch) -> tuple[Call, CompiledStep]:
    """A call that makes an eval step, and the step."""
    fv = work.fv
    step = make_eval_step(
        work.config,
        precision=work.precision,
        compile=work.compile,
        compile_fallback=fv.compile_fallback,
        loss=recipe.loss(fv.loss, several_labels=False),
    )
    return lambda: step(params, batch)["loss"], step


def training_batches(work: Workload) -> Iterator[Batch]:
    """The dataset's, as vitfn.train makes them, without end."""
    fv = work.fv
    dataset = recipe.dataset(fv, fv.channels, fv.seed)
    config = recipe.for_data(work.config, len(dataset.class_names), dataset.train.channels)
    fv["num_steps"].value = sys.maxsize
    return train._batches(fv, dataset.train.to(work.row.name), config, work.row.name, ALONE, 0)


def operations(work: Workload, training: bool) -> dict[str, int] | None:
    """Of one image: the `model`'s by convention, and those that are `needed`; None where they are not known."""
    if work.config.resnet or (training and work.optimizer.rules.frozen):
        return None
    model = flops.forward_flops(work.config)
    return {"model": 3 * model if training else model, "needed": flops.needed_flops(work.config, training)}


def ceiling(work: Workload) -> float:
    """Operations per second of the device's matrix products in the workload's precision."""
    return flops.measured_peak(work.row.name, PRECISIONS[work.precision] or torch.float32)
