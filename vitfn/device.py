"""The table of devices: everything that differs between them is a row here, and nothing else asks which it is."""

import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vitfn.errors import InputError, one_line
from vitfn.quiet import stdout_to_stderr


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device; `name` is torch's, of its tensors, its autocast and its module alike (torch.<name>).

    `precision` and `compile` are what 'auto' means there, `warnings` what is to be said of others. `backend` is
    torch.compile's, which the module `compiler`, if any, registers when it is imported; `collectives` is
    torch.distributed's, which `overlaps` with computing or takes the same cores. `leaf_by_leaf` says whether beside
    compiled blocks an update is compiled too, for one leaf at a time, as pays where memory is slow. `indexed` says
    whether each process takes one device of several, `pins` whether copies from pinned memory are faster. `missing()`
    is why there is no such device, empty where there is one; it is worth a warning where the `package` that brings it
    is installed. `environment` has the beginnings of the variables that change what the device does. `datasheet` has
    the maker's peaks: a regular expression over the device's whole name, and dense operations per second by precision.
    """

    name: str
    precision: str
    compile: str
    backend: str
    collectives: str
    missing: Callable[[], str]
    package: str = ""
    indexed: bool = True
    overlaps: bool = True
    leaf_by_leaf: bool = False
    compiler: str = ""
    pins: bool = False
    warnings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: tuple[str, ...] = ()
    datasheet: tuple[tuple[str, Mapping[str, float]], ...] = ()


def _installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _cuda_missing() -> str:
    return "" if torch.cuda.is_available() else "torch sees no such device"


def _sdaa_missing() -> str:
    loaded = hasattr(torch, "sdaa")  # by torch itself, or by the caller
    if not loaded and not _installed("torch_sdaa"):
        return "torch_sdaa is not installed"
    if (aligned := os.environ.get("TORCH_SDAA_ALIGN_NV_DEVICE")) not in (None, "a100", "v100"):
        # torch_sdaa would abort the process. vitfn's own random numbers are the same everywhere and need no alignment.
        return f"TORCH_SDAA_ALIGN_NV_DEVICE: found {aligned!r}, expected a100, v100 or no such variable"
    try:
        with stdout_to_stderr():
            if not loaded:
                importlib.import_module("torch_sdaa")
            count = torch.sdaa.device_count() if torch.sdaa.is_available() else 0  # type: ignore[attr-defined]
    except Exception as error:  # without a driver it fails in its own ways
        return one_line(f"torch_sdaa failed: {type(error).__name__}: {error}", 300)
    visible = os.environ.get("SDAA_VISIBLE_DEVICES")
    return "" if count else "torch_sdaa sees no card" + (f" (SDAA_VISIBLE_DEVICES={visible})" if visible else "")


# In the order in which 'auto' prefers them. The compile form is measured on the CPU (BUILD.md, 'Compile forms').
DEVICES = {
    row.name: row
    for row in (
        Device(
            "sdaa",
            precision="float16",
            compile="block",
            backend="teco_inductor",
            collectives="tccl",
            missing=_sdaa_missing,
            package="torch_sdaa",
            compiler="torch_sdaa._inductor",
            warnings={
                "bfloat16": "the matrix unit takes float16 alone and emulates bfloat16, without all of its range"
            },
            environment=("SDAA_", "TORCH_SDAA_", "TECO_"),
        ),
        Device(
            "cuda",
            precision="bfloat16",
            compile="block",
            backend="inductor",
            collectives="nccl",
            missing=_cuda_missing,
            pins=True,
            environment=("CUDA_", "NCCL_", "NVIDIA_TF32_OVERRIDE"),
            # NVIDIA's datasheets of H100 and H200 (SXM) and of A100: without sparsity, float32 without TF32
            datasheet=(
                (r"NVIDIA (H100 80GB HBM3|H200)", {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12}),
                (r"NVIDIA A100.*B( PCIe)?", {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12}),
            ),
        ),
        Device(
            "cpu",
            precision="float32",
            compile="block",
            backend="inductor",
            collectives="gloo",
            missing=lambda: "",
            indexed=False,
            overlaps=False,
            leaf_by_leaf=True,
            environment=("OMP_NUM_THREADS",),
        ),
    )
}


def row_of(device: torch.device) -> Device:
    """The row of a tensor's device. Raises InputError for one that is not in the table."""
    if device.type not in DEVICES:
        raise InputError(f"device: found tensors on {device.type!r}, expected one of {', '.join(DEVICES)}")
    return DEVICES[device.type]


def find(name: str) -> Device:
    """The row of 'auto' or of a device by name. Raises InputError for one that is unknown or not there."""
    if name == "auto":
        for row in DEVICES.values():
            if not (reason := row.missing()):
                return row
            if row.package and _installed(row.package):
                logging.getLogger("vitfn").warning("--device=auto passes %s over: %s", row.name, reason)
    if name not in DEVICES:
        raise InputError(f"--device: found {name!r}, expected one of auto, {', '.join(DEVICES)}")
    if reason := DEVICES[name].missing():
        present = ", ".join(row.name for row in DEVICES.values() if not row.missing())
        raise InputError(f"--device: found {name!r}, which is not here: {reason}; expected one of auto, {present}")
    return DEVICES[name]


def resolved_precision(row: Device, asked: str) -> str:
    """The precision that 'auto', or another, is on a device; warns of what the table warns of."""
    precision = row.precision if asked == "auto" else asked
    if precision in row.warnings:
        logging.getLogger("vitfn").warning("--precision=%s on %s: %s", precision, row.name, row.warnings[precision])
    return precision


def compile_backend(row: Device) -> str:
    """The name for torch.compile, registered as far as the device's own package does it."""
    if row.compiler:
        with contextlib.suppress(ImportError), stdout_to_stderr():  # else torch.compile says that the name is unknown
            importlib.import_module(row.compiler)
    return row.backend


def select(row: Device, index: int) -> None:
    """Makes the device of this number, from 0, the one that the row's name alone means in this process.

    Raises InputError where there are fewer.
    """
    if not row.indexed:
        return
    if (count := getattr(torch, row.name).device_count()) <= index:
        raise InputError(f"--device={row.name}: found {count} of them, too few for process {index}, counted from 0")
    getattr(torch, row.name).set_device(index)


def facts(row: Device) -> dict[str, Any]:
    """What a run notes of its device: its name, if known, and the environment's variables that change what it does."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(row.environment)}
    found = _call(row, "get_device_name")
    return ({"device_name": found} if found else {}) | {"environment": variables}


def peak_memory(row: Device) -> int | None:
    """The most bytes of the device that tensors took at once in this process; None where the device does not count."""
    return _call(row, "max_memory_allocated")


def forget_peak_memory(row: Device) -> None:
    """`peak_memory` counts from here, where the device counts."""
    _call(row, "reset_peak_memory_stats")


def datasheet_peak(row: Device, precision: str) -> float | None:
    """Operations per second that the device's maker states for its matrix products; None where the table has none."""
    name = _call(row, "get_device_name") or ""
    return next((peaks.get(precision) for pattern, peaks in row.datasheet if re.fullmatch(pattern, name)), None)


def free_memory(row: Device) -> int | None:
    """Bytes of the device that are free now; None where it does not say."""
    if found := _call(row, "mem_get_info"):
        return found[0]
    if row.indexed or not (said := Path("/proc/meminfo")).exists():
        return None
    # not os.sysconf's free pages, of which a cache of files leaves few
    return 1024 * int(re.search(r"MemAvailable: +(\d+) kB", said.read_text())[1])  # type: ignore[index]


def _call(row: Device, function: str, *arguments: Any) -> Any:
    """A function of torch.<name>; None where there is no such function, or it does not work."""
    try:
        return getattr(getattr(torch, row.name), function)(*arguments)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
