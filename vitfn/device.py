"""The table of devices: everything that differs between them is a row here, and nothing else asks which it is."""

import dataclasses
from collections.abc import Callable

import torch

from vitfn.errors import InputError


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device.

    `precision` and `compile` are what 'auto' means there; `backend` is torch.compile's; `available` probes for it.
    """

    name: str
    precision: str
    compile: str
    backend: str
    available: Callable[[], bool]


# In the order in which 'auto' prefers them. The compile form is measured on the CPU (BUILD.md, 'Compile forms').
DEVICES = {
    row.name: row
    for row in (
        Device("cuda", precision="bfloat16", compile="block", backend="inductor", available=torch.cuda.is_available),
        Device("cpu", precision="float32", compile="block", backend="inductor", available=lambda: True),
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
        return next(row for row in DEVICES.values() if row.available())
    if name not in DEVICES:
        raise InputError(f"--device: found {name!r}, expected one of auto, {', '.join(DEVICES)}")
    if not DEVICES[name].available():
        present = ", ".join(row.name for row in DEVICES.values() if row.available())
        raise InputError(f"--device: found {name!r}, which torch does not see here; expected one of auto, {present}")
    return DEVICES[name]
