"""Several processes on one CPU, through the public command: the same run as one process makes of the same batches."""

import json
import os
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import NANO, ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitfn import device, parallel
from vitfn.errors import InputError
from vitfn.parallel import ALONE, Ranks

pytestmark = pytest.mark.oldest

RUN = [
    "--name=run",
    *NANO,
    "--num_steps=30",
    "--warmup_steps=3",
    "--eval_every=15",
    "--compile=off",
    "--device=cpu",
    "--noreport",
]
RECIPES = {
    "sgd, everything random": [
        "--dropout_rate=0.1",
        "--stochastic_depth=0.2",
        "--mixup=0.2",
        "--cutmix=1",
        "--erasing=0.5",
    ],
    "adamw, an average, parts": [
        "--optimizer=adamw",
        "--learning_rate=0.001",
        "--ema=0.9",
        "--gradient_accumulation_steps=2",
    ],
}

# Runs the command; before the call numbered `count` of Ranks.max, the process of that rank sends itself a signal.
SIGNALLED = """if True:
    import os, sys
    from vitfn import parallel, train

    rank, count, number, *argv = sys.argv[1:]
    original, calls = parallel.Ranks.max, 0

    def counting(self, value):
        global calls
        calls += 1
        if self.rank == int(rank) and calls == int(count):
            os.kill(os.getpid(), int(number))
        return original(self, value)

    parallel.Ranks.max = counting
    parallel.leave(train.main(["train", *argv]))
"""


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def by_torchrun(cwd: Path, processes: int, *argv: str, code: int = 0) -> warm.Process:
    """The command by so many processes of torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = warm.run([*launcher, "-m", "vitfn.train", *argv], cwd, environment())
    assert done.returncode == code, done.stderr
    return done


def by_hand(cwd: Path, processes: int, *arguments: str | Path, **variables: str) -> list[warm.Process]:
    """Processes that no launcher watches over."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    each = [environment(RANK=str(rank), LOCAL_RANK=str(rank), **address, **variables) for rank in range(processes)]
    running = [warm.start(arguments, cwd, variables) for variables in each]
    for process in running:
        process.wait(300)
    return running


def together(cwd: Path, processes: int, *arguments: str | Path, **variables: str) -> str:
    """What so many processes, or one alone, print of a script or module that succeeds in all of them."""
    alone = processes == 1
    done = [warm.run(arguments, cwd, environment())] if alone else by_hand(cwd, processes, *arguments, **variables)
    assert [process.returncode for process in done] == [0] * processes, "".join(process.stderr for process in done)
    return "".join(process.stdout for process in done)


def command(cwd: Path, processes: int, *argv: str) -> str:
    """What so many processes of the command, or one alone, print."""
    return together(cwd, processes, "-m", "vitfn.train", *argv)


def rows(run: Path, kind: str) -> list[dict[str, float]]:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in logged if f"{kind}/loss" in row]


def relative_error(run: Path, reference: Path, steps: int = 30) -> float:
    """Unsigned and mean, of the training losses."""
    pairs = list(zip(rows(run, "train"), rows(reference, "train"), strict=True))
    assert [row["step"] for row, _ in pairs] == [row["step"] for _, row in pairs] == list(range(1, steps + 1))
    return sum(abs(a["train/loss"] - b["train/loss"]) / abs(b["train/loss"]) for a, b in pairs) / len(pairs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Path]:
    """For each recipe the directory of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for place, recipe in enumerate(RECIPES.values()):
        command(folder, 1, *RUN, *recipe, f"--output_dir={place}")
    return {name: folder / str(place) / "run" for place, name in enumerate(RECIPES)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [(next(iter(RECIPES)), 4), (list(RECIPES)[1], 2)])
def test_several_processes_make_the_run_of_one(tmp_path, alone, name, processes):
    argv = [*RUN, *RECIPES[name], "--tcap_log", "--output_dir=."]
    said = by_torchrun(tmp_path, 2, *argv).stdout if processes == 2 else command(tmp_path, processes, *argv)
    assert relative_error(tmp_path / "run", alone[name]) <= 1e-6
    for several, one in zip(rows(tmp_path / "run", "eval"), rows(alone[name], "eval"), strict=True):
        for measure in ("eval/count", "eval/correct", "eval/top5"):
            assert several[measure] == one[measure]
        assert several["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-5)
    # all of it in total, and what one device did
    last = rows(tmp_path / "run", "train")[-1]
    assert last["train/images_per_second"] == pytest.approx(processes * last["train/device_images_per_second"])
    assert last["train/device_loss"] != last["train/loss"]
    line = re.findall(r"rank : (\d)  train.loss : ([\d.e-]+)  train.ips : ([\d.]+) imgs/s", said)[-1]
    assert line == ("0", str(last["train/device_loss"]), str(last["train/device_images_per_second"]))
    assert said.count("TCAPPDLL") == 30
    assert re.search(
        rf"^devices +{processes}, {16 // processes} images of a batch each, data={processes},shard=1$",
        said,
        re.M,
    )
    assert said.count("test accuracy") == 1
    resolved = json.loads((tmp_path / "run/config.json").read_text())["resolved"]
    assert (resolved["processes"], resolved["device_batch_size"]) == (processes, 16 // processes)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_another_number_goes_on(tmp_path, alone):
    """The first update takes the second call of Ranks.max, so the twelfth signal comes before the eleventh is done."""
    name, recipe = next(iter(RECIPES.items()))
    stopped = by_hand(
        tmp_path, 2, "-c", SIGNALLED, "1", "12", str(int(signal.SIGTERM)), *RUN, *recipe, "--output_dir=."
    )
    assert [process.returncode for process in stopped] == [143, 143], stopped[0].stderr
    assert "stopped by SIGTERM after step" in stopped[0].stderr
    assert "stopped" not in stopped[1].stderr
    assert not (tmp_path / "run/model.npz").exists()
    assert len(list((tmp_path / "run/checkpoints").glob("step_*.npz"))) == 1
    command(tmp_path, 4, *RUN, *recipe, "--output_dir=.", "--resume")
    assert relative_error(tmp_path / "run", alone[name]) <= 1e-6


@pytest.mark.slow
def test_files_are_read_by_share_to_the_run_of_one_process(tmp_path):
    random = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "photos" / ("train" if i < 32 else "val") / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    files = [*RUN, "--dataset=folder", "--data_dir=photos", "--num_workers=1", "--flip"]
    command(tmp_path, 1, *files, "--output_dir=one")
    command(tmp_path, 2, *files, "--output_dir=two")
    assert relative_error(tmp_path / "two/run", tmp_path / "one/run") <= 1e-6
    for several, one in zip(rows(tmp_path / "two/run", "eval"), rows(tmp_path / "one/run", "eval"), strict=True):
        assert (several["eval/count"], several["eval/correct"]) == (one["eval/count"], one["eval/correct"])
    assert all(row["train/images_per_second"] > 0 for row in rows(tmp_path / "two/run", "train"))


def test_a_process_that_is_killed_ends_the_others_in_one_line(tmp_path):
    killed = by_hand(tmp_path, 2, "-c", SIGNALLED, "1", "12", str(int(signal.SIGKILL)), *RUN, "--output_dir=.")
    assert killed[1].returncode == -signal.SIGKILL
    assert killed[0].returncode == 1
    said = [line for line in killed[0].stderr.splitlines() if "vitfn" in line]
    assert len(said) == 1
    assert said[0].startswith("vitfn, process 0: the processes of the run lost each other: process 1 does not answer")
    assert "Traceback" not in killed[0].stderr


@pytest.mark.slow
def test_what_is_wrong_is_said_by_the_first_process_and_leaves_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    done = by_torchrun(tmp_path, 2, *RUN, "--output_dir=.", code=1)  # torchrun's own code
    said = [line for line in done.stderr.splitlines() if line.startswith("vitfn, ")]
    assert re.match(r"vitfn, process 0: --name=run: run exists; go on with --resume", said[0])
    assert all(re.match(r"vitfn, process 1: the processes of the run lost each other", line) for line in said[1:])
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "flag", "expected"),
    [
        ({}, -1, Ranks()),
        ({}, 0, Ranks()),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, -1, Ranks(5, 8, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 1, Ranks(5, 8, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8"}, 3, Ranks(5, 8, 3)),
    ],
)
def test_torchrun_and_older_launchers_say_who_a_process_is(monkeypatch, variables, flag, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parallel.from_environment(flag) == expected


@pytest.mark.parametrize(
    ("variables", "flag", "message"),
    [
        ({}, 1, "--local_rank=1: found no WORLD_SIZE in the environment; start it with torchrun"),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}, 2, "--local_rank: found 2, expected 1"),
    ],
)
def test_ranks_that_contradict_each_other_are_refused(monkeypatch, variables, flag, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        parallel.from_environment(flag)


def test_processes_that_nobody_told_where_to_meet_are_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    refused = pytest.raises(InputError, match="WORLD_SIZE=2: found no MASTER_ADDR in the environment; start it with")
    with refused, parallel.joined(Ranks(0, 2), device.DEVICES["cpu"]):
        pass


@given(size=st.integers(0, 1000), count=st.integers(1, 40))
def test_spans_are_the_whole_in_order_and_even(size, count):
    spans = [Ranks(rank, count).span(size) for rank in range(count)]
    assert [place for span in spans for place in range(*span)] == list(range(size))
    lengths = {stop - start for start, stop in spans}
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == 1 or size % count


def test_one_process_talks_to_nobody():
    assert ALONE.gather("x") == ["x"]
    assert ALONE.max(7) == 7
    with ALONE.first_alone():
        assert ALONE.first
