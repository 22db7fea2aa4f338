"""Runs code in a process of its own with the simulated device, since torch takes one such device a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def simulated(code: str | list[str], timeout: float = 300, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """`python -c code`, or python with these arguments, from the checkout's root, where `import torch_sdaa` works."""
    arguments = ["-c", code] if isinstance(code, str) else list(code)
    paths = [str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | fixed | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def sdaa():
    """`simulated`, where it runs; it is compiled here, once."""
    done = simulated("import torch_sdaa")
    if done.returncode and "ImportError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return simulated
