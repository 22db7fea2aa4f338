"""Learning rates as functions of the step: 0-d float32 tensors on its device, so that nothing waits for the host."""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from vitfn.errors import InputError

Schedule = Callable[[Tensor], Tensor]


def as_float(step: Tensor | int) -> Tensor:
    """A step as float32: 0-d where it is a number, else of its own shape."""
    return torch.as_tensor(step).to(torch.float32)


def constant(rate: float) -> Schedule:
    """The same rate at every step."""
    return lambda step: torch.full_like(as_float(step), rate)


def as_schedule(rate: Schedule | float) -> Schedule:
    """A schedule as it is, a number as a constant one. Raises InputError for what is neither."""
    if callable(rate):
        return rate
    if isinstance(rate, Real):
        return constant(float(rate))
    raise InputError(f"schedule: found {rate!r}, expected a number or a function of the step")


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then half a cosine from `peak` to 0 at `total_steps`.

    peak * min(1, t / warmup) * (1 + cos(pi p)) / 2 with p = (t - warmup) / (total - warmup) kept in [0, 1]
    (Loshchilov and Hutter, arXiv 1608.03983, without restarts; Google's vision_transformer).
    """

    def schedule(step: Tensor) -> Tensor:
        cosine = 0.5 * (1 + torch.cos(math.pi * _progress(step, total_steps, warmup_steps)))
        return peak * cosine * _warmup(step, warmup_steps)

    return schedule


def warmup_linear(peak: float, total_steps: int, warmup_steps: int = 0, floor: float = 1e-5) -> Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then a line from `peak` to `floor` at `total_steps`."""

    def schedule(step: Tensor) -> Tensor:
        progress = _progress(step, total_steps, warmup_steps)
        return (floor + (peak - floor) * (1 - progress)) * _warmup(step, warmup_steps)

    return schedule


def one_ahead(schedule: Schedule) -> Schedule:
    """The update numbered t from 0 at the rate of t + 1: the seed steps its scheduler before its optimizer."""
    return lambda step: schedule(step + 1)


def _progress(step: Tensor, total_steps: int, warmup_steps: int) -> Tensor:
    return ((as_float(step) - warmup_steps) / max(1, total_steps - warmup_steps)).clamp(0, 1)


def _warmup(step: Tensor, warmup_steps: int) -> Tensor:
    return (as_float(step) / max(1, warmup_steps)).clamp(max=1) if warmup_steps else torch.ones_like(as_float(step))
