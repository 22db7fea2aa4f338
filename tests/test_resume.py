"""Runs that are killed, stopped or out of space, as processes: each goes on to the bits of one that was left alone."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import NANO, ROOT

from vitfn import rng, snapshot, tree
from vitfn.archive import Archive

KILLS = int(os.environ.get("VITFN_KILLS", "3"))  # .ci/full asks for 30

RUN = [
    "--name=run",
    *NANO,
    "--num_steps=20",
    "--warmup_steps=2",
    "--eval_batch_size=359",
    "--eval_every=7",
    "--checkpoint_every=3",
    "--keep_checkpoints=2",
    "--compile=off",
    "--device=cpu",
    "--noreport",
]
EVERYTHING = ["--ema=0.9", "--dropout_rate=0.1", "--flip", "--mixup=0.2", "--stochastic_depth=0.1"]

# Runs the command with something done to it: before the call numbered `count` of the function at `path`, `act`.
DOING = """if True:
    import importlib, os, resource, signal, sys, time

    path, count, act, *argv = sys.argv[1:]
    calls = 0

    def limit():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    def interrupt_twice():
        from vitfn import snapshot

        def hang(*_):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1000)

        snapshot.write = hang
        os.kill(os.getpid(), signal.SIGINT)

    def lock_out():
        for folder in (".", "output", "output/run", "output/run/checkpoints"):
            if os.path.exists(folder):
                os.chmod(folder, 0o555)
        if os.getuid() == 0:  # who may write everywhere
            os.seteuid(65534)

    ACTS = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
        "interrupt group": lambda: os.killpg(0, signal.SIGINT),
        "interrupt twice": interrupt_twice,
        "limit": limit,
        "lock out": lock_out,
        "nothing": lambda: None,
    }

    def main():
        from vitfn import train

        module, name = path.rsplit(".", 1)
        owner = importlib.import_module(module)
        function = getattr(owner, name)

        def doing(*arguments, **options):
            global calls
            calls += 1
            if calls == int(count):
                ACTS[act]()
            return function(*arguments, **options)

        setattr(owner, name, doing)
        return train.main(["train", *argv])

    if __name__ == "__main__":
        sys.exit(main())
"""
STEP, EVALUATION = "vitfn.train.augment", "vitfn.train.evaluate"
WRITING, RENAMING, SYNCING = "numpy.lib.format.write_array", "os.replace", "os.fsync"


def train(cwd: Path, *argv: str, at: str = STEP, count: int = 0, act: str = "nothing", **options):
    """`python -m vitfn.train`, or the same with `act` done at a call."""
    command = ["-m", "vitfn.train", *argv]
    if act != "nothing":
        command = [str(cwd / "doing.py"), at, str(count), act, *argv]
        (cwd / "doing.py").write_text(DOING)
    return warm.run(command, cwd, os.environ | {"PYTHONPATH": str(ROOT)}, **options)


def said(done: subprocess.CompletedProcess) -> list[str]:
    """The command's own lines on stderr, without the bar's."""
    assert "Traceback" not in done.stderr, done.stderr
    return [part[part.index("vitfn: ") :] for part in done.stderr.splitlines() if "vitfn: " in part]


def rows(directory: Path) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    clock = ("train/images_per_second", "train/waiting")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_same_run(cwd: Path, other: Path) -> None:
    one, other = cwd / "output" / "run", other / "output" / "run"
    assert rows(one) == rows(other)
    newest = sorted(path.name for path in (other / "checkpoints").iterdir())
    assert sorted(path.name for path in (one / "checkpoints").iterdir())[-1] == newest[-1]
    for name in ("model.npz", "best.npz", f"checkpoints/{newest[-1]}"):  # the last: optimizer, averages, loss scale
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert not list(one.glob("**/.*.tmp"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Where a run with everything random in it was left alone."""
    cwd = tmp_path_factory.mktemp("alone")
    done = train(cwd, *RUN, *EVERYTHING)
    assert done.returncode == 0, done.stderr
    return cwd


# --- killed


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(alone, tmp_path):
    """While it steps, evaluates, writes arrays, syncs and renames; each time resumed, until all kills are spent."""
    seed = int(os.environ.get("VITFN_KILLS_SEED", "0"))
    numbers = random.Random(seed)
    kinds = [(WRITING, 10, 900), (RENAMING, 1, 10), (STEP, 1, 12), (SYNCING, 2, 10), (EVALUATION, 1, 2)]
    killed = 0
    while True:
        at, least, most = kinds[killed % len(kinds)]
        count = numbers.randint(least, most)
        act = "kill" if killed < KILLS else "nothing"
        print(f"seed {seed}, after {killed} kills: {act} at call {count} of {at}")  # pytest shows it if this fails
        done = train(tmp_path, *RUN, *EVERYTHING, "--resume", at=at, count=count, act=act)
        if done.returncode == -signal.SIGKILL:
            killed += 1
            continue
        assert done.returncode == 0, done.stderr
        assert_same_run(tmp_path, alone)
        if act == "nothing":
            break
        shutil.rmtree(tmp_path / "output")  # finished before it could be killed


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_behind_a_damaged_checkpoint_the_one_before_gives_the_same_bits(alone, tmp_path, damage):
    assert train(tmp_path, *RUN, *EVERYTHING, at=STEP, count=15, act="kill").returncode == -signal.SIGKILL
    newest = max((tmp_path / "output/run/checkpoints").iterdir())
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data[:-1000] if damage == "truncated" else data)
    done = train(tmp_path, *RUN, *EVERYTHING, "--resume")
    assert done.returncode == 0, done.stderr
    assert any("DAMAGED CHECKPOINT" in line and newest.name in line for line in said(done))
    assert_same_run(tmp_path, alone)


# --- signals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "code", "at", "count"),
    [("terminate", 143, STEP, 5), ("interrupt", 130, EVALUATION, 1), ("terminate", 143, STEP, 1)],
    ids=["SIGTERM in a step", "SIGINT in an evaluation", "SIGTERM in the first step"],
)
def test_a_signal_saves_says_how_to_go_on_and_changes_nothing(alone, tmp_path, act, code, at, count):
    done = train(tmp_path, *RUN, *EVERYTHING, at=at, count=count, act=act)
    assert done.returncode == code, done.stderr
    (line,) = said(done)
    step = 7 if at == EVALUATION else count
    assert f"after step {step}; go on with --resume" in line
    assert (tmp_path / f"output/run/checkpoints/step_{step:08d}.npz").exists()
    assert not (tmp_path / "output/run/model.npz").exists()
    done = train(tmp_path, *RUN, *EVERYTHING, "--resume")
    assert done.returncode == 0, done.stderr
    assert any(f"going on after step {step}" in line for line in said(done))
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_a_second_sigint_stops_at_once_though_the_disk_hangs(tmp_path):
    done = train(tmp_path, *RUN, at=STEP, count=2, act="interrupt twice")
    assert done.returncode == 130, done.stderr
    assert said(done) == ["vitfn: interrupted"]


@pytest.mark.slow
def test_an_interrupt_of_the_whole_process_group_leaves_no_traceback(tmp_path):
    """As Ctrl-C in a terminal does it: the workers that decode images get it too."""
    Image = pytest.importorskip("PIL.Image")
    numbers = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(numbers.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
    more = ["--dataset=folder", f"--data_dir={tmp_path / 'images'}", "--eval_batch_size=8", "--num_steps=12"]
    stopped, other = tmp_path / "stopped", tmp_path / "other"
    stopped.mkdir()
    other.mkdir()
    done = train(
        stopped, *RUN, *more, "--num_workers=2", at=STEP, count=5, act="interrupt group", start_new_session=True
    )
    assert done.returncode == 130, done.stderr
    assert ["after step 5" in line and "--resume" in line for line in said(done)] == [True]
    for cwd, flags in ((stopped, ["--num_workers=2", "--resume"]), (other, ["--num_workers=0"])):
        done = train(cwd, *RUN, *more, *flags)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert_same_run(stopped, other)


# --- no space, no access


@pytest.mark.slow
def test_files_that_may_not_grow_end_the_run_and_leave_the_checkpoint_before(alone, tmp_path):
    done = train(tmp_path, *RUN, *EVERYTHING, at=STEP, count=8, act="limit")
    assert done.returncode == 1, done.stderr
    (line,) = said(done)
    for part in ("could not be written", "File too large", "step_00000006.npz is intact", "--resume"):
        assert part in line
    assert not list((tmp_path / "output/run").glob("**/.*.tmp"))
    assert train(tmp_path, *RUN, *EVERYTHING, "--resume").returncode == 0
    assert_same_run(tmp_path, alone)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 5 MB, which two checkpoints of 2 MB and the best weights do not leave room for a third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "vitfn-test", disk], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("mounting needs root's capabilities")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(alone, small_disk):
    done = train(small_disk, *RUN, *EVERYTHING)
    assert done.returncode == 1, done.stderr
    (line,) = said(done)
    for part in ("could not be written", "No space left", "is intact", "--resume"):
        assert part in line
    left = list((small_disk / "output/run/checkpoints").iterdir())
    assert left
    assert not list((small_disk / "output/run").glob("**/.*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert train(small_disk, *RUN, *EVERYTHING, "--resume").returncode == 0
    assert_same_run(small_disk, alone)


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_is_one_line(small_disk):
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(small_disk).free == 0
    done = train(small_disk, *RUN)
    assert done.returncode == 1, done.stderr
    (line,) = said(done)
    assert "No space left" in line
    assert "output/run" in line


@pytest.fixture
def open_to_all():
    """A folder that another user could reach."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.slow
def test_a_folder_that_may_not_be_written_is_one_line(open_to_all):
    done = train(open_to_all, *RUN, at="vitfn.train._warn", count=1, act="lock out")
    assert done.returncode == 1, done.stderr
    (line,) = said(done)
    for part in ("output", "Permission denied", "give access"):
        assert part in line
    assert not (open_to_all / "output").exists()


@pytest.mark.slow
def test_a_folder_that_may_no_longer_be_written_leaves_the_checkpoint_before(alone, open_to_all):
    done = train(open_to_all, *RUN, *EVERYTHING, at=STEP, count=8, act="lock out")
    assert done.returncode == 1, done.stderr
    (line,) = said(done)
    for part in ("could not be written", "Permission denied", "step_00000006.npz is intact", "give access"):
        assert part in line
    os.chmod(open_to_all, 0o755)
    for path in open_to_all.rglob("*"):
        os.chmod(path, 0o755)
    assert train(open_to_all, *RUN, *EVERYTHING, "--resume").returncode == 0
    assert_same_run(open_to_all, alone)


# --- what else may happen to a run


@pytest.mark.slow
def test_gradients_that_are_not_finite_for_good_are_named_and_the_good_checkpoint_stays(tmp_path):
    """With a rate of 1e30 the first update, whose rate is 0, is the last good one."""
    done = train(tmp_path, *RUN, "--learning_rate=1e30", "--num_steps=200", "--checkpoint_every=1", "--eval_every=200")
    assert done.returncode == 1, done.stderr
    last = said(done)[-1]
    for part in ("are not finite", "/kernel", "the last good checkpoint is", "--learning_rate"):
        assert part in last
    assert not (tmp_path / "output/run/model.npz").exists()
    checkpoints = sorted(int(path.stem[5:]) for path in (tmp_path / "output/run/checkpoints").iterdir())
    bad = [row["step"] for row in rows(tmp_path / "output/run") if row["train/grad_norm"] is None]
    assert max(checkpoints) < min(bad)
    assert len(bad) >= 30


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_changes_nothing_and_changed_flags_are_listed(alone, tmp_path):
    shutil.copytree(alone / "output", tmp_path / "output")
    done = train(tmp_path, *RUN, *EVERYTHING, "--resume")
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert_same_run(tmp_path, alone)
    done = train(tmp_path, *RUN, *EVERYTHING, "--resume", "--seed=1", "--ema=0.5", "--keep_checkpoints=9")
    assert done.returncode == 2
    (line,) = said(done)
    for part in ("--seed=1", "--ema=0.5", "--seed=42", "--ema=0.9"):
        assert part in line
    assert "keep_checkpoints" not in line
    done = train(tmp_path, *RUN, *EVERYTHING)
    assert done.returncode == 2
    assert "--resume" in said(done)[0]
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("step", [20, 18], ids=["ended", "stopped"])
def test_a_run_with_other_random_numbers_is_shown_where_it_has_ended_and_else_refused(alone, tmp_path, step):
    """As an early version's checkpoints do not tell them; tests/test_written.py has such."""
    shutil.copytree(alone / "output", tmp_path / "output")
    checkpoints = tmp_path / "output/run/checkpoints"
    path = checkpoints / f"step_{step:08d}.npz"
    with Archive(path) as archive:
        leaves = {name: archive.read_exactly(name) for name in archive.shapes}
    notes = json.loads(leaves.pop("notes").numpy().tobytes())
    assert notes.pop("rng") == rng.VERSION
    for other in checkpoints.iterdir():
        other.unlink()
    snapshot.write(path, tree.unflatten(leaves), notes)
    done = train(tmp_path, *RUN, *EVERYTHING, "--resume")
    if step == 20:
        assert done.returncode == 0, done.stderr
        assert "test accuracy" in done.stdout
    else:
        assert done.returncode == 2, done.stderr
        (line,) = said(done)
        assert "--resume: found a run with random numbers of version 1, expected 2" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--precision=float16", "--train_batch_size=4", "--optimizer=adamw", "--momentum_dtype=bfloat16"],
        ["--compile=block", "--dropout_rate=0.1"],
    ],
    ids=["float16 with its loss scale", "a compiled block"],
)
def test_other_forms_go_on_to_the_same_bits_too(tmp_path, more):
    flags = [*RUN, "--num_steps=8", "--eval_every=8", *more]
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert train(other, *flags).returncode == 0
    assert train(one, *flags, at=STEP, count=5, act="terminate").returncode == 143
    done = train(one, *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(one, other)
    if "--precision=float16" in more:
        with np.load(max((one / "output/run/checkpoints").iterdir())) as arrays:
            assert {"scaling/scale", "scaling/good", "opt_state/count"} <= set(arrays)
