"""A run's directory: what is refused, what a killed run leaves, which lines of the metrics count."""

import errno
import json
import math
from pathlib import Path

import pytest

from vitfn.errors import InputError, RunError
from vitfn.run import RunDirectory


def opened(tmp_path: Path, **options) -> RunDirectory:
    return RunDirectory(str(tmp_path), "run", **options)


@pytest.fixture
def logged(tmp_path):
    """A function: a run whose metrics.jsonl is the given text, to be resumed."""

    def of(text: str) -> RunDirectory:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text(text)
        return opened(tmp_path, resume=True)

    return of


def lines(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_an_existing_directory_names_resume_and_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="--resume"):
        opened(tmp_path)
    assert list((tmp_path / "run").iterdir()) == []


def test_nothing_is_made_before_the_run_begins(tmp_path):
    opened(tmp_path)
    opened(tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_resume_begins_a_run_that_is_not_there(tmp_path):
    with opened(tmp_path, resume=True) as directory:
        assert directory.read_config() is None
        assert directory.start_at(0) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_what_killed_writers_leave_is_removed_and_nothing_else(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for path in (tmp_path / "run" / ".best.npz.17.tmp", checkpoints / ".step_00000010.npz.17.tmp"):
        path.write_bytes(b"half")
    for path in (tmp_path / "run" / ".mine", checkpoints / "notes.tmp"):
        path.write_bytes(b"whole")
    with opened(tmp_path, resume=True):
        pass
    assert {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()} == {
        ".mine",
        "notes.tmp",
        "metrics.jsonl",
    }


def test_a_config_comes_back_and_a_torn_one_is_named(tmp_path):
    with opened(tmp_path) as directory:
        directory.write_config({"seed": 1})
        assert directory.read_config() == {"seed": 1}
        (directory.path / "config.json").write_text('{"seed"')
        with pytest.raises(InputError, match=r"config\.json"):
            directory.read_config()


@pytest.mark.parametrize("torn", ["", '{"step": 3, "train', "\0\0\0\0", '{"step": 3}\n{"st'])
def test_a_torn_last_line_is_forgotten(logged, tmp_path, torn):
    with logged('{"step": 1}\n{"step": 2}\n' + torn) as directory:
        assert directory.start_at(2) == [{"step": 1}, {"step": 2}]
        directory.log(3, {"train/loss": 0.5})
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "train/loss": 0.5}]


EVALUATED = '{"step": 1}\n{"step": 2}\n{"step": 2, "eval/loss": null}\n{"step": 3}\n'


@pytest.mark.parametrize(("evaluated", "left"), [(False, 2), (True, 3)])
def test_what_was_logged_after_the_checkpoint_is_forgotten(logged, evaluated, left):
    """The evaluation after step 2 too, if the checkpoint does not know of it."""
    with logged(EVALUATED) as directory:
        kept = directory.start_at(2, evaluated)
    assert kept == [json.loads(line) for line in EVALUATED.splitlines()[:left]]


def test_evaluations_of_earlier_steps_are_kept(logged):
    with logged(EVALUATED) as directory:
        assert len(directory.start_at(3)) == 4


def test_floats_come_back_to_the_bit_and_what_is_not_finite_is_null(tmp_path):
    value = 0.1 + 0.2
    with opened(tmp_path) as directory:
        directory.start_at(0)
        directory.log(1, {"train/loss": value, "train/grad_norm": math.inf, "eval/loss": math.nan})
        assert directory.rows() == [{"step": 1, "train/loss": value, "train/grad_norm": None, "eval/loss": None}]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_written_ends_the_run_in_one_line(tmp_path, number):
    with pytest.raises(RunError, match=r"run/model\.npz: .*--resume"), opened(tmp_path) as directory:
        raise OSError(number, "as it is", str(directory.model_path))


def test_a_reader_that_has_gone_is_not_a_full_disk(tmp_path):
    with pytest.raises(BrokenPipeError), opened(tmp_path):
        raise BrokenPipeError


def test_the_error_of_a_full_disk_is_not_replaced_when_the_log_is_closed():
    """/dev/full takes no byte, and a file closed with something in its buffer tries again."""
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux's")
    directory = RunDirectory("/dev", "full", resume=True)
    directory._metrics = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        directory.log(1, {"train/loss": 1.0})
    directory.__exit__(None, None, None)


@pytest.mark.parametrize("where", ["", "run"])
def test_a_file_in_the_directory_s_place_is_the_flag_s_fault(tmp_path, where):
    (tmp_path / "file" / where).parent.mkdir(exist_ok=True)
    (tmp_path / "file" / where if where else tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"--output_dir.*file"),
        RunDirectory(str(tmp_path / "file"), "run", resume=True),
    ):
        pass
