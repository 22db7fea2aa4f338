"""Warm processes behave as cold ones do: what they are given, how they end, and what is heard of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

TELLING = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), sorted(os.environ.items()), __name__]))
print(sys.path[:2], file=sys.stderr)
"""


def cold(arguments: list, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def telling(tmp_path) -> Path:
    (tmp_path / "telling.py").write_text(TELLING)
    return tmp_path


@pytest.mark.parametrize("how", [["-c", TELLING], ["-m", "telling"], ["telling.py"]], ids=["code", "module", "script"])
def test_arguments_folder_variables_and_paths_are_a_cold_process_s(telling, how):
    env = {"LC_ALL": "C.UTF-8", "GIVEN": "é", "PYTHONPATH": str(telling / "more")}
    ours, theirs = (run([*how, "a", "--b=c d"], cwd=telling, env=env) for run in (warm.run, cold))
    assert ours.returncode == theirs.returncode == 0
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('said')", 1),
        ("raise KeyError('said')", 1),
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import atexit; atexit.register(print, 'at the end')", 0),
    ],
)
def test_a_process_ends_as_a_cold_one_does(tmp_path, code, expected):
    ours, theirs = (run(["-c", code], cwd=tmp_path, env=dict(os.environ)) for run in (warm.run, cold))
    assert ours.returncode == theirs.returncode == expected
    assert ours.stdout == theirs.stdout
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_several_run_at_once_and_know_nothing_of_each_other():
    code = "import sys, torch; torch.manual_seed(n := int(sys.argv[1])); print(torch.rand(()).item()); sys.exit(n)"
    running = [warm.start(["-c", code, number]) for number in range(3)]
    assert [process.wait(60) for process in running] == [0, 1, 2]
    assert len({process.stdout for process in running}) == 3
    assert len({process.pid for process in running} | {os.getpid()}) == 4


def test_ctrl_c_reaches_the_group_that_is_asked_for():
    process = warm.start(["-c", "import time; time.sleep(60)"], start_new_session=True)
    while os.getpgid(process.pid) != process.pid:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert process.stderr.endswith("KeyboardInterrupt\n")


def test_who_takes_too_long_is_killed():
    process = warm.start(["-c", "import time; time.sleep(60)"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_what_is_imported_at_first_is_there_already():
    assert warm.run(["-c", "import sys; print('torch' in sys.modules)"]).stdout == "True\n"
