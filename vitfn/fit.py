"""The training loop: steps, what is read of them, evaluations, checkpoints, and stopping well."""

import logging
import math
import signal
import time
from collections import ChainMap
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vitfn import tcap
from vitfn.errors import RunError
from vitfn.parallel import ALONE, Ranks
from vitfn.run import RunDirectory
from vitfn.signals import Stop, Stopped
from vitfn.step import Batch, Metrics, TrainState

_READ_EVERY = 0.5  # seconds between looks at the metrics: each look makes the host wait for the device
_SHOWN = 0.05  # of the time, spent waiting for batches, is shown by the bar
_GIVE_UP_AFTER = 30  # updates in a row whose gradients are not finite; a loss scale needs 16 to fall from 65536 to 1
log = logging.getLogger("vitfn")


class Plan(NamedTuple):
    """When things happen, in updates; `epoch_steps` make an epoch, `checkpoint_every` 0 is never but at the end."""

    num_steps: int
    eval_every: int
    checkpoint_every: int
    epoch_steps: float = 1.0
    tcap_log: bool = False

    def evaluates(self, done: int) -> bool:
        return done == self.num_steps or (done > 0 and done % self.eval_every == 0)

    def saves(self, done: int) -> bool:
        return done == self.num_steps or (self.checkpoint_every > 0 and done % self.checkpoint_every == 0)


class Job(NamedTuple):
    """What the loop asks of a command.

    `batches(start)` are this process's shares of the batches of the updates numbered from `start`. `evaluate` gives
    measures of the test split, `accuracy` among them. `save_best` makes a function that writes the weights, for a
    thread of its own, or has written them. `explain` says which leaves are not finite. `utilisation` is the MFU at
    a number of images per second and device, or None.
    """

    batches: Callable[[int], Generator[Batch, None, None]]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    after_first_step: Callable[[], None]
    evaluate: Callable[[TrainState], dict[str, float]]
    save_best: Callable[[TrainState], Callable[[], None] | None]
    explain: Callable[[TrainState, Batch], str]
    utilisation: Callable[[float], float | None] = lambda images_per_second: None


class Outcome(NamedTuple):
    """What a run ends with: the state, the last metrics by name, the updates made now, and the signal that ended it.

    `first_seconds` are those of the first update, with what it compiled, `other_seconds` those of the others, of which
    `waiting` is the share, 0 to 1, that passed before a batch was there.
    """

    state: TrainState
    metrics: dict[str, float]
    updates: int
    first_seconds: float
    other_seconds: float
    waiting: float
    stopped: int | None


class _Unread:
    """Metrics of steps that are still on the device, the time since they were last read, and what of it was waiting."""

    def __init__(self, processes: int) -> None:
        self._values: list[Tensor] = []
        self._names: list[str] = []
        self._images, self._processes = 0, processes
        self._started = time.perf_counter()
        self.waited = 0.0  # seconds

    def next_of(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. The host waits; a device that has work queued may not."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        return batch

    def add(self, metrics: Metrics, images: int) -> None:
        self._names = [f"train/{name}" for name in metrics]
        self._values.append(torch.stack([value.float() for value in metrics.values()]))
        self._images += images

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def read(self) -> tuple[list[dict[str, float]], float]:
        """The metrics of each step, and the seconds they took together; waits for the device."""
        values = torch.stack(self._values).tolist()
        rate = self._images / (seconds := self.seconds)
        rates = {"train/images_per_second": rate * self._processes, "train/waiting": self.waited / seconds}
        if self._processes > 1:
            rates["train/device_images_per_second"] = rate
        return [dict(zip(self._names, row, strict=True)) | rates for row in values], seconds


def fit(
    directory: RunDirectory, job: Job, state: TrainState, notes: dict[str, Any], plan: Plan, ranks: Ranks = ALONE
) -> Outcome:
    """Trains from `state` to `plan.num_steps`; logs, evaluates, keeps checkpoints and the best weights.

    `notes` are what a checkpoint knows beside the state. Several `ranks` go through it together: a signal to one of
    them stops all after the same step. Raises RunError where files cannot be written and where the
    gradients are no longer finite.
    """
    start, snapshots = int(state.step), directory.snapshots
    evaluated = notes.get("evaluated") == start
    earlier = directory.start_at(start, evaluated)
    latest: dict[str, float] = dict(ChainMap(*reversed(earlier)))
    seconds: list[float] = []  # of each reading, the first of which is the first step alone
    waited: list[float] = []  # of these
    bad = 0  # updates in a row that were skipped, up to now

    def evaluate_now(done: int) -> None:
        # alone: who left in the middle would leave the others waiting
        with stop.at_once() if ranks.count == 1 else nullcontext():
            metrics = job.evaluate(state)
        directory.log(done, {f"eval/{name}": value for name, value in metrics.items()})
        latest.update({f"eval/{name}": value for name, value in metrics.items()})
        notes["evaluated"] = done
        if done and metrics["accuracy"] > notes.get("best", {}).get("accuracy", -1.0):
            notes["best"] = {"step": done, "accuracy": metrics["accuracy"]}
            if write := job.save_best(state):
                snapshots.submit(write, f"the best weights, of step {done},")

    def read(done: int) -> None:
        nonlocal bad
        rows, elapsed = unread.read()
        first = done - len(rows) + 1
        for number, row in enumerate(rows, first):
            directory.log(number, row)
        if plan.tcap_log and ranks.first:
            tqdm.write("\n".join(_tcap_line(number - 1, row, plan) for number, row in enumerate(rows, first)))
        skipped = [number for number, row in enumerate(rows, first) if not math.isfinite(row["train/grad_norm"])]
        if skipped:
            log.warning("step %d: gradients not finite; %d of %d updates skipped", skipped[0], len(skipped), len(rows))
        trailing = _trailing(rows)
        bad = bad + trailing if trailing == len(rows) else trailing
        latest.update(rows[-1])
        seconds.append(elapsed)
        waited.append(unread.waited)
        used = job.utilisation(latest["train/images_per_second"] / ranks.count)
        bar.set_description("training")
        bar.set_postfix_str(
            "loss={train/loss:.4f}, rate={train/learning_rate:.2e}, {train/images_per_second:.1f} images/s".format(
                **latest
            )
            + ("" if used is None else f", MFU {used:.0%}")
            + (", {train/waiting:.0%} waiting for data".format(**latest) if latest["train/waiting"] > _SHOWN else "")
        )

    with (
        Stop() as stop,
        logging_redirect_tqdm(),
        tqdm(total=plan.num_steps, initial=start, unit="step", disable=not ranks.first) as bar,
        closing(job.batches(start)) as batches,
    ):
        done = start
        try:
            if plan.evaluates(start) and not evaluated:
                evaluate_now(start)
            unread = _Unread(ranks.count)
            bar.set_description("first step")
            for done in range(start + 1, plan.num_steps + 1):
                batch = unread.next_of(batches)
                state, metrics = job.train_step(state, batch)
                unread.add(metrics, len(batch[0]))
                snapshots.check()
                # asked once: a signal that comes later finds nothing unread at its break
                stopping = ranks.max(stop.signal or 0)
                due = plan.evaluates(done) or plan.saves(done) or bool(stopping)
                if due or done == start + 1 or unread.seconds > _READ_EVERY:
                    read(done)
                    unread = _Unread(ranks.count)
                    if bad >= _GIVE_UP_AFTER:
                        raise RunError(_hopeless(done, bad, job.explain(state, batch), directory))
                if done == start + 1:
                    job.after_first_step()
                    unread = _Unread(ranks.count)
                bar.update()
                if stopping:
                    break
                if plan.evaluates(done):
                    evaluate_now(done)
                if plan.saves(done) and not bad:
                    snapshots.save(state, notes)
                if due:
                    unread = _Unread(ranks.count)
        except Stopped:
            pass
        stopped = ranks.max(stop.signal or 0) or None
        if stopped and done > start and not bad:
            snapshots.save(state, notes)
        snapshots.wait()
    if stopped:
        log.warning("stopped by %s after step %d; go on with --resume", signal.Signals(stopped).name, done)
    others = sum(seconds[1:])
    waiting = sum(waited[1:]) / others if others else 0.0
    return Outcome(state, latest, done - start, sum(seconds[:1]), others, waiting, stopped)


def _tcap_line(iteration: int, row: dict[str, float], plan: Plan) -> str:
    """Of the first device alone, as the ModelZoo asks."""
    loss, rate = (row.get(f"train/device_{name}", row[f"train/{name}"]) for name in ("loss", "images_per_second"))
    return tcap.line(iteration, int(iteration / plan.epoch_steps), loss, rate)


def _trailing(rows: list[dict[str, float]]) -> int:
    """How many of the last rows in a row were skipped."""
    good = [i for i, row in enumerate(rows) if math.isfinite(row["train/grad_norm"])]
    return len(rows) - 1 - good[-1] if good else len(rows)


def _hopeless(done: int, bad: int, leaves: str, directory: RunDirectory) -> str:
    directory.snapshots.wait()
    kept = directory.snapshots.files()
    return (
        f"the gradients of the last {bad} updates, {done - bad + 1} to {done}, are not finite: {leaves}; "
        + (f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint yet")
        + "; a lower --learning_rate or another --precision may help"
    )
