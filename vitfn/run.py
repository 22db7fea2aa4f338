"""A run: its directory (config.json, metrics.jsonl, the final weights) and the loop that fills it."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vitfn.errors import InputError
from vitfn.files import replacing
from vitfn.step import Batch, Metrics, TrainState
from vitfn.tree import Tree

_READ_EVERY = 0.5  # seconds between looks at the metrics: each look makes the host wait for the device
_LOGGED = ("loss", "grad_norm", "learning_rate")
log = logging.getLogger("vitfn")


class RunDirectory:
    """`<output_dir>/<name>/`, which must be new. Made on entering the context, so that a refused run leaves nothing."""

    def __init__(self, output_dir: str, name: str):
        self.path = Path(output_dir) / name
        self.model_path = self.path / "model.npz"
        self._metrics: Any = None
        if self.path.exists():
            raise InputError(f"--name={name}: {self.path} exists; choose another --name or --output_dir, or remove it")

    def __enter__(self) -> "RunDirectory":
        self.path.mkdir(parents=True)
        self._metrics = open(self.path / "metrics.jsonl", "a")
        return self

    def __exit__(self, *_) -> None:
        self._metrics.close()

    def write_config(self, config: dict[str, Any]) -> None:
        with replacing(self.path / "config.json") as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, after `step` updates."""
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()


class Outcome(NamedTuple):
    """The final parameters, the last metrics by name, and the seconds of the first step and of the others."""

    params: Tree
    metrics: dict[str, float]
    first_seconds: float
    other_seconds: float


def fit(
    directory: RunDirectory,
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batch: Callable[[int], Batch],
    evaluate: Callable[[Tree], dict[str, float]],
    *,
    num_steps: int,
    eval_every: int,
    after_first_step: Callable[[], None] = lambda: None,
) -> Outcome:
    """Takes `num_steps` steps on `batch(step)`, evaluating every `eval_every` of them and at the end; logs both."""
    latest: dict[str, float] = {}
    unread: list[Tensor] = []  # each (3,): a step's metrics, still on the device
    first_seconds = other_seconds = 0.0

    def read(done: int, images: int, seconds: float) -> None:
        """Writes the metrics of the steps up to number `done` that have not been read yet."""
        rate = images / seconds
        first = done - len(unread) + 1
        for step, values in enumerate(torch.stack(unread).tolist(), first):
            metrics = dict(zip((f"train/{name}" for name in _LOGGED), values, strict=True))
            if not math.isfinite(metrics["train/grad_norm"]):
                log.warning(
                    "step %d: gradients are not finite (loss %s); the update was skipped", step, metrics["train/loss"]
                )
            latest.update(metrics)
            directory.log(step, metrics | {"train/images_per_second": rate})
        unread.clear()
        bar.set_postfix(
            loss=f"{latest['train/loss']:.4f}", rate=f"{latest['train/learning_rate']:.2e}", images=f"{rate:.1f}/s"
        )

    with logging_redirect_tqdm([log]), tqdm(total=num_steps, unit="step", desc="first step") as bar:
        started, images = time.perf_counter(), 0
        for step in range(num_steps):
            state, metrics = train_step(state, (inputs := batch(step)))
            unread.append(torch.stack([metrics[name] for name in _LOGGED]))
            images += len(inputs[0])
            done = step + 1
            evaluating = done % eval_every == 0 or done == num_steps
            seconds = time.perf_counter() - started
            if step == 0 or evaluating or seconds > _READ_EVERY:
                read(done, images, seconds)
                seconds = time.perf_counter() - started
                first_seconds, other_seconds = (seconds, 0.0) if step == 0 else (first_seconds, other_seconds + seconds)
                if step == 0:
                    bar.set_description("training")
                    after_first_step()
                if evaluating:
                    latest.update(_evaluate(directory, evaluate, state.params, done))
                started, images = time.perf_counter(), 0
            bar.update()
        if num_steps == 0:
            latest.update(_evaluate(directory, evaluate, state.params, 0))
    return Outcome(state.params, latest, first_seconds, other_seconds)


def _evaluate(
    directory: RunDirectory, evaluate: Callable[[Tree], dict[str, float]], params: Tree, step: int
) -> dict[str, float]:
    metrics = {f"eval/{name}": value for name, value in evaluate(params).items()}
    directory.log(step, metrics)
    return metrics
