"""Which operators, or kernels of a device, a step spends its time in."""

import csv
import io
import os
import re
from typing import NamedTuple

from vitfn.files import replacing
from vitfn.timing import Call

_STEPS = 3
_FUSED = re.compile(r"(?=.*attention)(?=.*(flash|efficient|cudnn|fused))(?!.*backward)", re.I)


class Operator(NamedTuple):
    """Calls and milliseconds a step, without those of the operators that it calls, and their share of all (0 to 1)."""

    name: str
    calls: float
    milliseconds: float
    share: float


def profiled(call: Call) -> tuple[list[Operator], list[str]]:
    """The operators of a step, those that take most first, and the names of the fused forms of attention among them.

    Where the device has kernels of its own, and torch's profiler sees them, they are what is listed.
    """
    from torch.autograd import DeviceType
    from torch.profiler import profile

    with profile(acc_events=True) as profiler:
        for _ in range(_STEPS):
            call().item()
    events = profiler.key_averages()
    # operators have their kernels' time too, and annotations that of whatever they span
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    times = [(event, event.self_device_time_total) for event in kernels]
    if not any(time for _, time in times):
        times = [(event, event.self_cpu_time_total) for event in events if event.device_type == DeviceType.CPU]
    whole = sum(time for _, time in times)
    found = [
        Operator(event.key, event.count / _STEPS, time / 1000 / _STEPS, time / whole)
        for event, time in times
        if time > 0
    ]
    fused = sorted({event.key for event in events if _FUSED.match(event.key)})
    return sorted(found, key=lambda each: -each.milliseconds), fused


def write_csv(path: str | os.PathLike, operators: list[Operator]) -> None:
    """A line for each operator under a line of the fields' names."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Operator._fields)
    writer.writerows((name, f"{calls:g}", f"{ms:.4f}", f"{share:.6f}") for name, calls, ms, share in operators)
    with replacing(path) as file:
        file.write(text.getvalue().encode())
