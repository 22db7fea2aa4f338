"""Runs code in a process of its own with the simulated device, since torch takes one such device a process."""

import os
from pathlib import Path

import pytest
import warm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def variables() -> dict[str, str]:
    """With which `import torch_sdaa` works."""
    paths = [str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def simulated(code: str | list[str], cwd: Path = ROOT, **env: str) -> warm.Process:
    """`python -c code`, or python with these arguments, from the checkout's root."""
    arguments = ["-c", code] if isinstance(code, str) else list(code)
    return warm.run(arguments, cwd, os.environ | variables() | env)


@pytest.fixture(scope="session")
def sdaa():
    """`simulated`, where it runs; it is compiled here, once."""
    done = simulated("import torch_sdaa")
    if done.returncode and "ImportError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return simulated
