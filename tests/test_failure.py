"""Processes that are killed, stopped or hung, through the public command: named, restarted, and the same weights."""

import contextlib
import functools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import NANO, ROOT
from test_parallel import by_hand, environment, rows

from vitfn.watch import Answer, verdict

KILLS = int(os.environ.get("VITFN_KILLS", "3"))  # .ci/full asks for 20
STEPS = 24 + 14 * KILLS
RUN = [
    "--name=run",
    *NANO,
    f"--num_steps={STEPS}",
    "--warmup_steps=2",
    "--eval_every=25",
    "--checkpoint_every=3",
    "--dropout_rate=0.1",
    "--ema=0.9",
    "--compile=off",
    "--device=cpu",
    "--noreport",
    "--output_dir=.",
]
# Seconds: to ask, to end, until torchrun's SIGKILL (torch 2.7's; here 2.13 is told 5), and for a busy machine.
ASK, GRACE, TORCHRUN, SLACK = 7, 10, 30, 15

# Runs the command; before the call numbered `count` of Ranks.max, that of the rank acts, unless it was restarted.
ACTING = """if True:
    import os, signal, sys, time
    from vitfn import parallel, train, watch

    rank, count, act, *argv = sys.argv[1:]
    original, calls, lost = parallel.Ranks.max, 0, watch.Watch.lost
    if os.environ["RANK"] == os.environ.get("LATE"):
        watch.Watch.lost = lambda self: time.sleep(2) or lost(self)

    def acting(self, value):
        global calls
        calls += 1
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and self.rank == int(rank) and calls == int(count):
            print("acting at", time.time(), file=sys.stderr, flush=True)
            if act == "sleep":
                time.sleep(1000)
            os.kill(os.getpid(), getattr(signal, act))
        return original(self, value)

    parallel.Ranks.max = acting
    if __name__ == "__main__":
        parallel.leave(train.main(["train", *argv]))
"""


@contextlib.contextmanager
def torchrun(cwd: Path, restarts: int, *argv: str, processes: int = 2) -> Iterator[subprocess.Popen]:
    """The command, or a script with its arguments, under torchrun; what it says is in the file cwd/said."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    what = argv if argv[0].endswith(".py") else ("-m", "vitfn.train", *argv)
    with open(cwd / "said", "w") as said:
        process = subprocess.Popen(
            [*launcher, f"--max_restarts={restarts}", *what],
            cwd=cwd,
            env=environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5"),
            stdout=said,
            stderr=said,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                for worker in workers(process).values():
                    os.kill(worker, signal.SIGKILL)
                process.kill()
            process.wait()


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """The processes by rank that a torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == launcher.pid:
                variables = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(value[5:]): int(folder.name) for value in variables if value.startswith(b"RANK=")}
    return found


def wait_for(condition, seconds: float = 120):
    """What a condition comes to, once it is true."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return value


def started_anew(launcher: subprocess.Popen, before: dict[int, int]) -> dict[int, int]:
    """Both processes by rank, once neither is one of those before."""
    return wait_for(
        lambda: len(there := workers(launcher)) == 2 and not {*there.values()} & {*before.values()} and there
    )


def logged(cwd: Path) -> int:
    """The lines of metrics.jsonl."""
    with contextlib.suppress(FileNotFoundError):
        return (cwd / "run/metrics.jsonl").read_text().count("\n")
    return 0


def assert_same_weights(one: Path, other: Path) -> None:
    with np.load(one / "run/model.npz") as found, np.load(other / "run/model.npz") as expected:
        pairs = [(found[name].astype(np.float64), expected[name].astype(np.float64)) for name in expected.files]
    difference = sum(((a - b) ** 2).sum() for a, b in pairs) ** 0.5
    assert difference <= 1e-6 * sum((b**2).sum() for _, b in pairs) ** 0.5
    for kind in ("train", "eval"):
        losses = [[(row["step"], row[f"{kind}/loss"]) for row in rows(cwd / "run", kind)] for cwd in (one, other)]
        assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
        np.testing.assert_allclose(*[[loss for _, loss in side] for side in losses], rtol=1e-6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[str], Path]:
    """A function: where a run on a mesh was left alone. Another mesh sums in another order, which 300 steps show."""

    @functools.cache
    def run(mesh: str) -> Path:
        cwd = tmp_path_factory.mktemp("undisturbed")
        with torchrun(cwd, 0, *RUN, f"--mesh={mesh}") as process:
            assert process.wait(300) == 0, (cwd / "said").read_text()
        return cwd

    return run


def lines(text: str) -> list[str]:
    """The command's own, in the order in which they were said."""
    return re.findall(r"vitfn, process \d: .*", text)


# --- the verdict


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({0: (5, "at a"), 2: (5, "at a")}, "process 1 does not answer: killed, stopped or cut off"),
        ({2: (5, "at a")}, "processes 0, 1 do not answer: killed, stopped or cut off"),
        ({0: (5, "at a"), 1: (4, "at b"), 2: (5, "at a")}, "process 1 hangs or is late, at b"),
        ({0: (4, ""), 1: (3, "at b"), 2: (5, "at a")}, "process 0 has ended; process 1 hangs or is late, at b"),
        (dict.fromkeys(range(3), (5, "at a")), "all of them answer: the network fails, or --timeout is too short"),
    ],
)
def test_who_does_not_answer_is_lost_and_else_who_is_behind(answers, expected):
    assert verdict({rank: Answer(*answer) for rank, answer in answers.items()}, 3) == expected


# --- killed


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", pytest.param("shard=2", marks=pytest.mark.oldest)])
def test_a_run_whose_processes_are_killed_at_random_ends_with_the_same_weights(undisturbed, tmp_path, mesh):
    """From outside, any of them, at any time: while it starts, or some updates later. Nobody does anything else."""
    seed = int(os.environ.get("VITFN_KILLS_SEED", "0"))
    numbers = random.Random(seed)
    there: dict[int, int] = {}
    with torchrun(tmp_path, KILLS, *RUN, f"--mesh={mesh}") as process:
        for kill in range(KILLS):
            there = started_anew(process, there)
            if updates := numbers.randrange(12):
                start = logged(tmp_path)
                wait_for(lambda start=start: logged(tmp_path) != start)  # it falls back to the last checkpoint
                end = logged(tmp_path) + updates
                wait_for(lambda end=end: logged(tmp_path) >= end)
            time.sleep(numbers.uniform(0, 0.1 if updates else 4))
            victim = numbers.randrange(2)
            print(f"seed {seed}, kill {kill}: process {victim} after {logged(tmp_path)} lines")  # shown if this fails
            os.kill(there[victim], signal.SIGKILL)
        assert process.wait(300) == 0, (tmp_path / "said").read_text()
    assert_same_weights(tmp_path, undisturbed(mesh))


# --- hung


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "rank", "named", "seconds"),
    [
        pytest.param(
            *("SIGSTOP", 0, "process 0 does not answer: killed, stopped or cut off", ASK + TORCHRUN),
            marks=pytest.mark.full,
        ),
        ("sleep", 1, r"process 1 hangs or is late, at fit.py, line \d+, in fit", ASK + GRACE),
    ],
)
def test_a_process_that_hangs_is_named_and_the_run_starts_anew(undisturbed, tmp_path, act, rank, named, seconds):
    (tmp_path / "acting.py").write_text(ACTING)
    with torchrun(tmp_path, 1, "acting.py", str(rank), "12", act, *RUN, "--timeout=10") as process:
        at = wait_for(lambda: re.search(r"acting at ([\d.]+)", (tmp_path / "said").read_text()))
        started_anew(process, workers(process))
        assert time.time() - float(at[1]) <= 10 + seconds + SLACK
        assert process.wait(300) == 0, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert re.search(rf"process {1 - rank}: the processes of the run lost each other: {named} \(", said), said
    ended = re.findall(rf"vitfn, process {rank}: ended, at fit.py, line \d+, in fit: the others gave up", said)
    assert len(ended) == (act == "sleep"), said
    assert "Traceback" not in said
    assert "going on after step" in said
    assert_same_weights(tmp_path, undisturbed("data=2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "rank", "named"),
    [
        ("SIGKILL", 0, "process 0 does not answer"),
        pytest.param("SIGSTOP", 0, "process 0 does not answer", marks=pytest.mark.full),
        pytest.param("sleep", 2, r"process 2 hangs or is late, at fit.py, line \d+, in fit", marks=pytest.mark.full),
    ],
)
def test_without_a_launcher_all_end_too_and_the_first_process_may_be_the_one_that_is_lost(tmp_path, act, rank, named):
    """It keeps the store that the others ask through, though one of them asks late."""
    started = time.monotonic()
    with stopped_ones_killed(tmp_path):
        done = by_hand(
            tmp_path, 3, "-c", ACTING, str(rank), "12", act, *RUN, "--train_batch_size=12", "--timeout=10", LATE="1"
        )
    assert time.monotonic() - started <= 20 + 10 + ASK + GRACE + SLACK
    for place, process in enumerate(done):
        if place == rank:
            assert process.returncode == (1 if act == "sleep" else -signal.SIGKILL)
        else:
            assert process.returncode == 1, process.stderr
            (line,) = lines(process.stderr.replace("\r", "\n"))
            assert re.match(rf"vitfn, process {place}: the processes of the run lost each other: {named} \(", line)
            assert "Traceback" not in process.stderr
    assert not (tmp_path / "run/model.npz").exists()


@contextlib.contextmanager
def stopped_ones_killed(cwd: Path) -> Iterator[None]:
    """Kills a process that is stopped once it is the last one in a folder, as nobody else would."""
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.2):
            here = [folder for folder in Path("/proc").glob("[0-9]*") if is_in(folder, cwd)]
            if len(here) == 1 and (here[0] / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
                os.kill(int(here[0].name), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_in(process: Path, cwd: Path) -> bool:
    with contextlib.suppress(OSError):  # it has just ended, or is another user's
        return Path(os.readlink(process / "cwd")) == cwd
    return False


# --- what a restart does not do


@pytest.mark.slow
def test_a_restart_goes_on_with_nothing_that_this_job_did_not_begin(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with torchrun(tmp_path, 1, *RUN) as process:
        assert process.wait(120) == 1  # torchrun's own code
    said = (tmp_path / "said").read_text()
    assert len(re.findall(r"process 0: --name=run: run exists; go on with --resume", said)) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


@pytest.mark.slow
def test_one_process_is_restarted_too(tmp_path):
    with torchrun(tmp_path, 1, *RUN, processes=1) as process:
        wait_for(lambda: logged(tmp_path) > 8)
        os.kill(workers(process)[0], signal.SIGKILL)
        assert process.wait(120) == 0
    assert "going on after step" in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_a_scheduler_that_stops_torchrun_finds_a_checkpoint(tmp_path):
    """What torchrun makes of its workers' 143 is its own: an error, whose code is 1."""
    with torchrun(tmp_path, 3, *RUN, "--num_steps=100000", "--checkpoint_every=0") as process:
        wait_for(lambda: logged(tmp_path) > 8)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    said = (tmp_path / "said").read_text()
    (step,) = re.findall(r"process 0: stopped by SIGTERM after step (\d+); go on with --resume", said)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step_{int(step):08d}.npz"]


# --- what is written about it


def test_the_launch_files_in_the_documents_parse():
    (script,) = fenced("bash", 1)
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(fenced("yaml", 0)[0])
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert job["spec"]["elasticPolicy"]["minReplicas"] == worker["replicas"]
    (container,) = worker["template"]["spec"]["containers"]
    for text in (script, " ".join(container["command"] + container["args"])):
        assert "torchrun" in text
        (flagfile,) = re.findall(r"--flagfile=(\S+)", text)
        assert (ROOT / flagfile).exists()
        assert "--resume" in text


def fenced(language: str, start: int) -> list[str]:
    """The code of a language in docs/cluster.md, from the block of that number on."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)[start:]
