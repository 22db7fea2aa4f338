"""How long a step takes, and how much memory this process does."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

_ROUND = 0.1  # seconds that a round takes at least, so that launching and waiting are a small part of it
_LEAST = 3  # rounds, whatever the time

Call = Callable[[], Tensor]  # its result, a 0-d tensor, can be read when its work is done


def seconds(call: Call, calls: int = 1) -> float:
    """Seconds that each of `calls` takes, with one wait for the device at their end."""
    start = time.perf_counter()
    for _ in range(calls):
        last = call()
    last.item()
    return (time.perf_counter() - start) / calls


def steady(calls: dict[str, Call], rounds: int, limit: float) -> dict[str, list[float]]:
    """Seconds that each of the calls takes, in `rounds` in which all have their turn, or fewer after `limit` seconds.

    The first call of each, which compiles, should have been made. At least 3 rounds; their bar on stderr has the names.
    """
    counts = {name: max(1, round(_ROUND / min(seconds(call), seconds(call)))) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + limit
    for done in tqdm(range(1, rounds + 1), ", ".join(calls), unit="round", delay=2, leave=False):
        for name, call in calls.items():
            found[name].append(seconds(call, counts[name]))
        if done >= _LEAST and time.perf_counter() > end:
            break
    return found


def milliseconds(found: list[float]) -> dict[str, float]:
    """Median and quartiles of at least two seconds, in milliseconds."""
    lower, median, upper = (1000 * part for part in statistics.quantiles(found, n=4, method="inclusive"))
    return {"median": median, "lower": lower, "upper": upper}


def resident() -> tuple[int, int] | None:
    """Bytes of this process that are in memory now, and the most that have been; None where the system does not say.

    Where it says the latter only, that is both.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
        now, most = (1024 * int(sizes[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        return now, most
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most
