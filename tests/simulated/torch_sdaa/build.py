"""Compiles hooks.cpp at the first import, once for each version of it and of torch."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("hooks.cpp")


def library() -> Path:
    """The compiled library. Raises ImportError where there is no compiler, or it fails."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {platform.machine()}".encode()).hexdigest()[:16]
    default = Path(tempfile.gettempdir()) / f"simulated_sdaa_{os.getuid()}"
    folder = Path(os.environ.get("SIMULATED_SDAA_BUILD") or default)
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"hooks_{key}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it whatever becomes of the process
        if not built.exists():
            _compile(built)
    return built


def _compile(built: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise ImportError("the simulated device needs a C++ compiler, and there is no g++ or clang++")
    major, minor = (int(number) for number in torch.__version__.split(".")[:2])
    partial = built.with_suffix(".partial")
    home = Path(torch.__file__).parent
    include, libraries = home / "include", home / "lib"
    command = [
        *[
            compiler,
            f"-std=c++{20 if (major, minor) >= (2, 10) else 17}",
            "-O0",
            "-fPIC",
            "-shared",
            "-w",
            str(SOURCE),
            "-o",
            str(partial),
        ],
        *[f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"],
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *[f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu", "-ltorch"],
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ImportError(f"the simulated device does not compile: {done.stderr[:2000]}")
    partial.rename(built)
