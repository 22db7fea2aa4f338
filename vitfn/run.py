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
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self._metrics.write(json.dumps({"step": step, **numbers}) + "\n")
        self._metrics.flush()


class Outcome(NamedTuple):
    """What a run ends with: the parameters, the last metrics by name, the seconds of the first step and the others."""

    params: Tree
    metrics: dict[str, float]
    first_seconds: float
    other_seconds: float


class _Unread:
    """Metrics of steps that are still on the device, and the time since they were last read."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []  # each (3,)
        self._images = 0
        self._started = time.perf_counter()

    def add(self, metrics: Metrics, images: int) -> None:
        self._values.append(torch.stack([metrics[name] for name in _LOGGED]))
        self._images += images

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def read(self) -> tuple[list[dict[str, float]], float]:
        """The metrics of each step, and the seconds they took together; waits for the device."""
        values = torch.stack(self._values).tolist()
        rate = self._images / (seconds := self.seconds)
        names = [f"train/{name}" for name in _LOGGED]
        return [{**dict(zip(names, row, strict=True)), "train/images_per_second": rate} for row in values], seconds


def fit(
    directory: RunDirectory,
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batch: Callable[[int], Batch],
    evaluate: Callable[[Tree], dict[str, float]],
    *,
    num_steps: int,
    eval_every: int,
    after_first_step: Callable[[], None],
) -> Outcome:
    """Takes `num_steps` steps on `batch(step)`, evaluating every `eval_every` of them and at the end; logs both."""
    latest: dict[str, float] = {}
    seconds: list[float] = []  # of each reading, the first of which is the first step alone

    def evaluate_now(done: int) -> None:
        metrics = {f"eval/{name}": value for name, value in evaluate(state.params).items()}
        directory.log(done, metrics)
        latest.update(metrics)

    with logging_redirect_tqdm(), tqdm(total=num_steps, unit="step", desc="first step") as bar:
        unread = _Unread()
        for done in range(1, num_steps + 1):
            images, labels = batch(done - 1)
            state, metrics = train_step(state, (images, labels))
            unread.add(metrics, len(images))
            evaluating = done % eval_every == 0 or done == num_steps
            if done == 1 or evaluating or unread.seconds > _READ_EVERY:
                rows, elapsed = unread.read()
                for step, row in enumerate(rows, done - len(rows) + 1):
                    directory.log(step, row)
                skipped = [
                    i for i, row in enumerate(rows, done - len(rows) + 1) if not math.isfinite(row["train/grad_norm"])
                ]
                if skipped:
                    log.warning(
                        "step %d: gradients not finite; %d of %d updates skipped", skipped[0], len(skipped), len(rows)
                    )
                latest.update(rows[-1])
                seconds.append(elapsed)
                bar.set_description("training")
                bar.set_postfix_str("loss={train/loss:.4f}, rate={train/learning_rate:.2e}, "
                                    "{train/images_per_second:.1f} images/s".format(**latest))  # fmt: skip
                if done == 1:
                    after_first_step()
                if evaluating:
                    evaluate_now(done)
                unread = _Unread()
            bar.update()
        if num_steps == 0:
            evaluate_now(0)
    return Outcome(state.params, latest, sum(seconds[:1]), sum(seconds[1:]))
