"""A contender in a process of its own, which peers.py starts: a line on stdin is a question, one of JSON the answer."""

import contextlib
import functools
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

Step = Callable[[], float]


def imported(contender: str) -> Callable[[SimpleNamespace], Step]:
    """What makes the step of a job, after all the contender's imports. Raises ImportError where a package is absent."""
    if contender == "Flax":
        return importlib.import_module("peers_flax").flax_step
    peers_torch = importlib.import_module("peers_torch")
    if contender == "vitfn":
        importlib.import_module("vitfn")
        return peers_torch.vitfn_step
    if contender == "Hugging Face":
        with contextlib.suppress(ImportError):  # transformers imports it where it is installed
            peers_torch.import_torchvision()
        importlib.import_module("transformers.models.vit.modeling_vit")
        return functools.partial(peers_torch.module_step, peers_torch.huggingface_model, "huggingface5", False)
    peers_torch.import_torchvision()
    if contender == "torchvision":
        return functools.partial(peers_torch.module_step, peers_torch.torchvision_model, "torchvision", False)
    importlib.import_module("timm.models")
    return functools.partial(peers_torch.module_step, peers_torch.timm_model, "timm", contender == "timm compiled")


def status(field: str) -> int:
    """Bytes: VmRSS is what is resident, VmHWM the most that was since `forget_peak`. Not on Linux: the most ever."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Memory:
    """Bytes above those after the imports: the peak of all, and `steady`, of the steps since `settle`."""

    def __init__(self, device: str):
        self.before, self.first = status("VmRSS"), 0
        self.accelerator = None if device == "cpu" else getattr(importlib.import_module("torch"), device)

    def peak(self) -> int:
        return self.accelerator.max_memory_allocated() if self.accelerator else status("VmHWM") - self.before

    def settle(self) -> dict:
        self.first = self.peak()
        self.accelerator.reset_peak_memory_stats() if self.accelerator else forget_peak()
        return {}

    def answer(self) -> dict:
        steady = self.peak()
        return {"peak": max(self.first, steady), "steady": steady}


def timed(step: Step, job: SimpleNamespace, memory: Memory) -> dict:
    """A step's seconds and loss; on an accelerator the mean of several after one that wakes it, and all memory back."""
    if memory.accelerator:
        step()
    repeats = 10 if memory.accelerator else 1
    start = time.perf_counter()
    for _ in range(repeats):
        loss = step()
    seconds = (time.perf_counter() - start) / repeats
    if memory.accelerator:
        memory.accelerator.empty_cache()  # the others are on the same device
    return {"seconds": seconds, "loss": loss}


def main() -> None:
    contender, job = sys.argv[1], json.loads(sys.argv[2], object_hook=lambda fields: SimpleNamespace(**fields))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print

    def answer(fields: dict) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        make = imported(contender)
        memory = Memory(job.device)
        step = make(job)
    except ImportError as error:
        answer({"left_out": str(error)})
        return
    answer({})
    questions = {"step": lambda: timed(step, job, memory), "settle": memory.settle, "memory": memory.answer}
    for line in sys.stdin:
        answer(questions[line.strip()]())


if __name__ == "__main__":
    main()
