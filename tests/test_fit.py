"""The loop, on a job of two numbers: what happens when, what is logged, how it stops and how it goes on."""

import json
import logging
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from vitfn import fit as fit_module
from vitfn.errors import RunError
from vitfn.fit import Job, Plan, fit
from vitfn.run import RunDirectory
from vitfn.signals import Stop, Stopped
from vitfn.step import TrainState

IMAGES = 4  # a batch


class Toy:
    """A job whose loss is the batch's number and whose parameter is the sum of them; `events` tells what was asked."""

    def __init__(self, tmp_path: Path, *, bad=(), accuracy=lambda step: 0.5, on=lambda event: None):
        self.tmp_path, self.bad, self.accuracy, self.on = tmp_path, set(bad), accuracy, on
        self.events: list[str] = []

    def say(self, event: str) -> None:
        self.events.append(event)
        self.on(event)

    def batches(self, start: int):
        try:
            for step in range(start, 10**6):
                yield torch.full((IMAGES,), float(step)), torch.zeros(IMAGES)
        finally:
            self.events.append("closed")

    def train_step(self, state, batch):
        number = int(state.step) + 1
        self.say(f"step {number}")
        norm = torch.tensor(math.nan if number in self.bad else 1.0)
        metrics = {"loss": batch[0][0], "grad_norm": norm, "learning_rate": torch.tensor(0.1)}
        return TrainState(state.step + 1, {"w": state.params["w"] + batch[0][0]}, {}), metrics

    def evaluate(self, state):
        self.say(f"evaluate {int(state.step)}")
        return {"loss": float(state.params["w"]), "accuracy": self.accuracy(int(state.step))}

    def save_best(self, state):
        step = int(state.step)
        return lambda: (self.tmp_path / "best").write_text(str(step))

    def run(self, plan: Plan, *, resume: bool = False, keep: int = 2, name: str = "run"):
        with RunDirectory(str(self.tmp_path), name, resume=resume, keep=keep) as directory:
            state, notes = TrainState(0, {"w": torch.zeros(())}, {}), {}
            if saved := directory.snapshots.latest(state) if resume else None:
                state, notes = saved
            job = Job(
                self.batches,
                self.train_step,
                lambda: self.say("first"),
                self.evaluate,
                self.save_best,
                lambda state, batch: "parameters of head/kernel",
            )
            return fit(directory, job, state, notes, plan)


def rows(tmp_path: Path, name: str = "run") -> list[dict]:
    """metrics.jsonl without what the clock says."""
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    clock = ("train/images_per_second", "train/waiting")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def checkpoints(tmp_path: Path, name: str = "run") -> list[int]:
    return sorted(int(path.stem[5:]) for path in (tmp_path / name / "checkpoints").glob("*.npz"))


def send(number: int, at: str, times: int = 1):
    """An `on` that sends this process a signal at an event."""

    def on(event: str) -> None:
        if event == at:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return on


# --- what happens when


def test_steps_evaluations_and_the_end(tmp_path):
    toy = Toy(tmp_path)
    outcome = toy.run(Plan(num_steps=5, eval_every=2, checkpoint_every=0))
    steps = ["step 1", "first", "step 2", "evaluate 2", "step 3", "step 4", "evaluate 4", "step 5", "evaluate 5"]
    assert toy.events == [*steps, "closed"]
    assert (int(outcome.state.step), outcome.updates, outcome.stopped) == (5, 5, None)
    assert float(outcome.state.params["w"]) == 0 + 1 + 2 + 3 + 4
    assert outcome.metrics["eval/loss"] == 10
    assert outcome.metrics["train/loss"] == 4


def test_every_step_is_logged_once_and_before_its_evaluation(tmp_path):
    Toy(tmp_path).run(Plan(5, 2, 0))
    logged = [(row["step"], "eval/loss" in row) for row in rows(tmp_path)]
    assert logged == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True)]
    assert [row["train/loss"] for row in rows(tmp_path) if "train/loss" in row] == [0, 1, 2, 3, 4]


def test_the_share_of_time_spent_waiting_for_batches_is_logged(tmp_path, monkeypatch):
    """By a clock that only batches (9 s, then 3 s each) and steps (1 s) move; the outcome leaves out the first."""
    now = 0.0
    monkeypatch.setattr(fit_module.time, "perf_counter", lambda: now)

    class Slow(Toy):
        def batches(self, start: int):
            nonlocal now
            for batch in super().batches(start):
                now += 3 if float(batch[0][0]) else 9
                yield batch

        def train_step(self, state, batch):
            nonlocal now
            now += 1
            return super().train_step(state, batch)

    outcome = Slow(tmp_path).run(Plan(5, 100, 0))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line)["train/waiting"] for line in lines if "train/loss" in line]
    assert shares == [0.9, 0.75, 0.75, 0.75, 0.75]
    assert (outcome.first_seconds, outcome.other_seconds, outcome.waiting) == (10, 16, 0.75)


@pytest.mark.parametrize(
    ("batch", "shown"), [(0.25, "loss=1.0000, rate=1.00e-01, 3.2 images/s, 20% waiting"), (0.03, "")]
)
def test_the_bar_says_so_only_where_waiting_takes_time(tmp_path, monkeypatch, capsys, batch, shown):
    """Steps of 1 s."""
    now = 0.0
    monkeypatch.setattr(fit_module.time, "perf_counter", lambda: now)

    class Slow(Toy):
        def batches(self, start: int):
            nonlocal now
            for each in super().batches(start):
                now += batch
                yield each

        def train_step(self, state, batch):
            nonlocal now
            now += 1
            return super().train_step(state, batch)

    Slow(tmp_path).run(Plan(2, 100, 0))
    bar = capsys.readouterr().err
    assert "loss=1.0000" in bar
    assert shown in bar
    assert ("waiting" in bar) == bool(shown)


@pytest.mark.parametrize(
    ("every", "keep", "left"), [(0, 2, [7]), (3, 9, [3, 6, 7]), (3, 2, [6, 7]), (1, 3, [5, 6, 7]), (7, 2, [7])]
)
def test_checkpoints_come_when_they_are_due_and_at_the_end(tmp_path, every, keep, left):
    Toy(tmp_path).run(Plan(7, 100, every), keep=keep)
    assert checkpoints(tmp_path) == left


def test_no_steps_are_one_evaluation_and_no_files_of_weights(tmp_path):
    toy = Toy(tmp_path)
    outcome = toy.run(Plan(0, 2, 2))
    assert toy.events == ["evaluate 0"]
    assert (outcome.updates, outcome.stopped) == (0, None)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl"}
    assert not (tmp_path / "best").exists()


def test_the_best_weights_are_the_first_of_the_most_accurate(tmp_path):
    Toy(tmp_path, accuracy={1: 0.1, 2: 0.7, 3: 0.7, 4: 0.3}.get).run(Plan(4, 1, 0))
    assert (tmp_path / "best").read_text() == "2"


def test_the_best_is_remembered_over_an_interruption(tmp_path):
    accuracy = {2: 0.7, 4: 0.5, 6: 0.6}.get
    Toy(tmp_path, accuracy=accuracy, on=send(signal.SIGTERM, "step 3")).run(Plan(6, 2, 0))
    (tmp_path / "best").unlink()
    Toy(tmp_path, accuracy=accuracy).run(Plan(6, 2, 0), resume=True)
    assert not (tmp_path / "best").exists()


def test_the_vendor_s_lines_are_printed_for_each_step(tmp_path, capsys):
    Toy(tmp_path).run(Plan(4, 100, 0, epoch_steps=2.0, tcap_log=True))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("TCAPPDLL")]
    assert [line.split("Epoch: ")[1].split("  rank")[0] for line in lines] == [
        "0 Iteration: 0",
        "0 Iteration: 1",
        "1 Iteration: 2",
        "1 Iteration: 3",
    ]


# --- gradients that are not finite


def test_one_bad_step_is_said_and_training_goes_on(tmp_path, caplog):
    outcome = Toy(tmp_path, bad=[3]).run(Plan(5, 5, 0))
    assert outcome.updates == 5
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] != []
    assert "step 3: gradients not finite" in caplog.text
    assert [row["step"] for row in rows(tmp_path) if row.get("train/grad_norm", 0) is None] == [3]


def test_gradients_that_are_not_finite_for_good_end_the_run(tmp_path):
    """However the steps were grouped when they were read; the good checkpoint stays, and no bad one takes its place."""
    toy = Toy(tmp_path, bad=range(6, 1000))
    with pytest.raises(RunError) as error:
        toy.run(Plan(1000, 1000, checkpoint_every=5), keep=1)
    for part in ("6 to ", "parameters of head/kernel", "step_00000005.npz", "--learning_rate"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert checkpoints(tmp_path) == [5]
    assert toy.events[-1] == "closed"
    assert rows(tmp_path)[-1]["step"] >= 5 + fit_module._GIVE_UP_AFTER


def test_a_run_that_was_never_finite_has_no_checkpoint(tmp_path):
    with pytest.raises(RunError, match=r"updates, 1 to \d+, .*there is no checkpoint yet"):
        Toy(tmp_path, bad=range(1000)).run(Plan(1000, 1000, 10))


def test_bad_steps_with_good_ones_between_are_not_for_good(tmp_path):
    bad = [step for step in range(1, 120) if step % (fit_module._GIVE_UP_AFTER - 1)]
    assert Toy(tmp_path, bad=bad).run(Plan(120, 200, 1)).updates == 120


@pytest.mark.parametrize(
    ("bad", "trailing"), [([], 0), ([1, 2], 0), ([3], 1), ([1, 2, 3], 3), ([1, 3], 1), ([2, 3], 2)]
)
def test_trailing_counts_the_skipped_at_the_end(bad, trailing):
    norms = [math.inf if number in bad else 1.0 for number in (1, 2, 3)]
    assert fit_module._trailing([{"train/grad_norm": norm} for norm in norms]) == trailing


def test_a_signal_among_bad_steps_keeps_the_good_checkpoint(tmp_path):
    toy = Toy(tmp_path, bad=range(6, 99), on=send(signal.SIGTERM, "step 8"))
    assert toy.run(Plan(99, 100, 5), keep=1).stopped == signal.SIGTERM
    assert checkpoints(tmp_path) == [5]


# --- signals

PLAN = Plan(num_steps=8, eval_every=3, checkpoint_every=4)


@pytest.fixture
def uninterrupted(tmp_path):
    """The rows of a run of PLAN and its parameters."""
    outcome = Toy(tmp_path).run(PLAN, name="uninterrupted")
    return rows(tmp_path, "uninterrupted"), float(outcome.state.params["w"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("at", "saved"),
    [("step 1", 1), ("first", 1), ("step 3", 3), ("evaluate 3", 3), ("step 4", 4), ("step 8", 8), ("evaluate 8", 8)],
)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(tmp_path, uninterrupted, caplog, number, at, saved):
    outcome = Toy(tmp_path, on=send(number, at)).run(PLAN)
    if at == "first":  # which comes after the loop has looked for signals
        saved += 1
    assert (outcome.stopped, int(outcome.state.step)) == (number, saved)
    assert max(checkpoints(tmp_path)) == saved
    assert f"stopped by {number.name} after step {saved}; go on with --resume" in caplog.text
    again = Toy(tmp_path).run(PLAN, resume=True)
    assert again.stopped is None
    assert rows(tmp_path) == uninterrupted[0]
    assert float(again.state.params["w"]) == uninterrupted[1]


def test_a_signal_from_another_thread_at_any_moment_loses_no_line(tmp_path, uninterrupted):
    """Many moments: also those between the loop's looks at the signal."""
    for i in range(20):
        timer = threading.Timer(0.0005 * i, os.kill, (os.getpid(), signal.SIGTERM))
        with Stop():  # else a signal that comes too late ends pytest
            timer.start()
            outcome = Toy(tmp_path).run(PLAN, name=f"run{i}")
            timer.join()
        if outcome.stopped:
            Toy(tmp_path).run(PLAN, name=f"run{i}", resume=True)
        assert rows(tmp_path, f"run{i}") == uninterrupted[0]


def test_a_signal_before_the_first_evaluation_of_a_resumed_run_changes_nothing(tmp_path, uninterrupted):
    Toy(tmp_path, on=send(signal.SIGTERM, "evaluate 3")).run(PLAN)
    Toy(tmp_path, on=send(signal.SIGTERM, "evaluate 3")).run(PLAN, resume=True)
    toy = Toy(tmp_path)
    toy.run(PLAN, resume=True)
    assert toy.events[:2] == ["evaluate 3", "step 4"]
    assert rows(tmp_path) == uninterrupted[0]


def test_an_evaluation_that_no_checkpoint_knows_of_is_made_again(tmp_path, uninterrupted):
    """Killed after an evaluation was logged, before the best weights of it were written."""
    Toy(tmp_path, on=send(signal.SIGTERM, "evaluate 3")).run(PLAN)
    (tmp_path / "best").unlink(missing_ok=True)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "eval/loss": 3.0, "eval/accuracy": 0.5}\n')
    Toy(tmp_path).run(PLAN, resume=True)
    assert rows(tmp_path) == uninterrupted[0]
    assert (tmp_path / "best").read_text() == "3"


def test_a_finished_run_that_is_resumed_does_nothing(tmp_path, uninterrupted):
    toy = Toy(tmp_path)
    outcome = toy.run(PLAN, resume=True, name="uninterrupted")
    assert toy.events == []
    assert (outcome.updates, outcome.stopped) == (0, None)
    assert rows(tmp_path, "uninterrupted") == uninterrupted[0]
    assert outcome.metrics["eval/loss"] == uninterrupted[1]


def test_a_second_sigint_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Toy(tmp_path, on=send(signal.SIGINT, "step 3", times=2)).run(PLAN)
    assert rows(tmp_path)[-1]["step"] <= 2
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_sigterm_changes_nothing(tmp_path):
    outcome = Toy(tmp_path, on=send(signal.SIGTERM, "step 3", times=3)).run(PLAN)
    assert (outcome.stopped, int(outcome.state.step)) == (signal.SIGTERM, 3)


def test_handlers_are_put_back_even_after_an_error(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def fail(event):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Toy(tmp_path, on=fail).run(PLAN)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(Toy(tmp_path).run(PLAN)))
    thread.start()
    thread.join()
    assert outcomes[0].updates == 8


def test_stopped_is_raised_once_while_the_first_unwinds():
    unwound = []

    def twice() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            unwound.append(True)

    with Stop() as stop:
        for _ in range(2):  # the second block is not entered
            with pytest.raises(Stopped), stop.at_once():
                twice()
    assert unwound == [True]


def test_a_write_that_fails_in_the_background_ends_the_run_at_a_later_step(tmp_path):
    toy = Toy(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(RunError, match=r"checkpoint of step \d+ could not be written .*--resume"):
        toy.run(Plan(10**5, 10**5, 3), resume=True)
    assert toy.events[-1] == "closed"
