"""What vitfn.bench measures of a workload in one process: rows of bench.json."""

from typing import Any

import torch

from vitfn import device, operators, timing, workload
from vitfn.timing import milliseconds, steady
from vitfn.workload import Workload


def _train(work: Workload) -> dict[str, Any]:
    return _step(work, training=True)


def _eval(work: Workload) -> dict[str, Any]:
    return _step(work, training=False)


def _step(work: Workload, training: bool) -> dict[str, Any]:
    fv, before = work.fv, timing.resident()
    size = fv.train_batch_size if training or not fv["eval_batch_size"].present else fv.eval_batch_size
    make, name = (workload.training, "train") if training else (workload.evaluating, "eval")
    call, step = make(work, workload.parameters(work), workload.random_batch(work, size))
    first, ceiling = timing.seconds(call), workload.ceiling(work)
    device.forget_peak_memory(work.row)
    found = steady({name: call}, fv.rounds, fv.seconds)[name]
    memory, kind = device.peak_memory(work.row), "device"
    if memory is None and before and (after := timing.resident()):
        memory, kind = after[1] - before[0], "process"
    ceiling = max(ceiling, workload.ceiling(work))
    times = milliseconds(found)
    rate = 1000 * size / times["median"]
    peak, counted = device.datasheet_peak(work.row, work.precision), workload.operations(work, training)

    def used(operations: str, peak: float | None) -> float | None:
        return counted[operations] * rate / peak if counted and peak else None

    return {
        "batch_size": size,
        "form": step.form,
        "failures": step.failures,
        "first_seconds": first,
        "rounds": len(found),
        "milliseconds": times,
        "images_per_second": rate,
        "operations_per_image": counted,
        "operations_per_second": {"ceiling": ceiling, "datasheet": peak},
        "utilisation": {
            "mfu": used("model", ceiling),
            "needed": used("needed", ceiling),
            "mfu_of_datasheet": used("model", peak),
        },
        "peak_memory": {"bytes": memory, "of": kind},
    }


def _input(work: Workload) -> dict[str, Any]:
    batches = workload.training_batches(work)

    def call() -> torch.Tensor:
        return next(batches)[0][0, 0, 0, 0]

    first = timing.seconds(call)
    times = milliseconds(steady({"input": call}, work.fv.rounds, work.fv.seconds)["input"])
    return {
        "dataset": work.fv.dataset,
        "batch_size": work.fv.train_batch_size,
        "first_seconds": first,
        "milliseconds": times,
        "images_per_second": 1000 * work.fv.train_batch_size / times["median"],
    }


def _parts(work: Workload) -> dict[str, Any]:
    """Forward is the eval step, update the optimizer's (of a step that is one graph: beside compiled blocks), and
    backward what the train step takes beside them.
    """
    params, batch = workload.parameters(work), workload.random_batch(work, work.fv.train_batch_size)
    whole, step = workload.training(work, params, batch)
    forward, _ = workload.evaluating(work, params, batch)
    timing.seconds(whole)
    optimizer, updates = workload.timed(work.optimizer)
    form = "block" if step.form == "step" else step.form or work.compile
    watched, _ = workload.training(work._replace(optimizer=optimizer, compile=form), params, batch)
    timing.seconds(watched)
    timing.seconds(forward)
    updates.clear()
    found = steady({"train": whole, "update": watched, "forward": forward}, work.fv.rounds, work.fv.seconds)
    train, ahead, update = (milliseconds(each)["median"] for each in (found["train"], found["forward"], updates))
    parts = {"forward": ahead, "backward": max(0.0, train - ahead - update), "update": update}
    listed, fused = operators.profiled(whole)
    return {
        "form": step.form,
        "milliseconds": parts,
        "shares": {name: part / sum(parts.values()) for name, part in parts.items()},
        "fused_attention": fused,
        "operators": [operator._asdict() for operator in listed],
    }


MEASURES = {"train": _train, "eval": _eval, "input": _input, "parts": _parts}
