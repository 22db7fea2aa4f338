"""A stand-in for the vendor's torch_sdaa on the CPU: the device `sdaa`, its module torch.sdaa, the collectives `tccl`.

Not the device's: speed, sums in another order, its float16 products, asynchronous errors, copies for channels_last,
limits of memory, and which operators it lacks. Stricter than it: float64 and operands on two devices raise. With torch
2.7.1 autocast inside torch.func.grad fails in the backward pass, as on every PrivateUse1 device of that torch.
"""

import atexit
import os
import sys
import types

import torch

from torch_sdaa.build import library

if os.environ.get("TORCH_SDAA_ALIGN_NV_DEVICE") not in (None, "a100", "v100"):
    print("torch_sdaa: invalid TORCH_SDAA_ALIGN_NV_DEVICE", file=sys.stderr, flush=True)
    os.abort()

torch.ops.load_library(str(library()))
_native = torch.ops.simulated_sdaa


_PROPERTIES = types.SimpleNamespace(name="sdaa", total_memory=2**34, major=0, minor=0)  # no multi_processor_count


def _index(device=None) -> int:
    if device is None:
        return _native.current()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _native.current() if index is None else index


class device:
    """`with torch.sdaa.device(i):` selects a device for a while."""

    def __init__(self, to):
        self._to = to

    def __enter__(self):
        self._before = _native.current()
        _native.select(_index(self._to))

    def __exit__(self, *_):
        _native.select(self._before)


def _module() -> types.ModuleType:
    module = types.ModuleType("torch.sdaa")
    functions = {
        "is_available": lambda: _native.count() > 0,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device": device,
        "device_count": _native.count,
        "current_device": _native.current,
        "set_device": lambda device: _native.select(_index(device)),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": _native.seed,
        "manual_seed_all": _native.seed,
        "get_rng_state": lambda device=None: _native.rng_state(),
        "set_rng_state": lambda state, device=None: _native.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "is_bf16_supported": lambda: True,
        "get_device_name": lambda device=None: f"/dev/tcaicard{_index(device) // 4}",
        "get_device_properties": lambda device=None: _PROPERTIES,
        "get_device_capability": lambda device=None: None,
        "memory_allocated": lambda device=None: _native.allocated(_index(device)),
        "max_memory_allocated": lambda device=None: _native.most_allocated(_index(device)),
        "reset_peak_memory_stats": lambda device=None: _native.forget_most(_index(device)),
    }
    vars(module).update(functions)
    return module


torch.utils.rename_privateuse1_backend("sdaa")
torch._register_device_module("sdaa", _module())
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)

from torch_sdaa import distributed  # noqa: E402, F401  (tccl, for a device that now exists)

# The vendor's attention is one operator. Torch's composed one computes in float32, which autocast undoes inside of
# torch.func.grad, after autograd has noted float32: its backward pass fails there.
torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)

if os.environ.get("TORCH_SDAA_AUTOLOAD") == "cuda_migrate":
    for name in vars(torch.sdaa).keys() & vars(torch.cuda).keys():
        if not name.startswith("__"):
            setattr(torch.cuda, name, getattr(torch.sdaa, name))
    torch.cuda.get_device_capability = lambda device=None: (0, 0)  # torch 2.7.1's Dynamo compares it
    torch.cuda.is_current_stream_capturing = lambda: False  # 2.15's asks; a CUDA build without a driver raises

if operators := os.environ.get("SIMULATED_SDAA_OPERATORS"):

    @atexit.register
    def _write_operators() -> None:
        with open(operators, "w") as file:
            file.writelines(f"{name}\n" for name in sorted(_native.operators()))


_TABLE = {
    "Host IP": "127.0.0.1",
    "PyTorch": torch.__version__,
    "Torch-SDAA": "3.2.0 (simulated)",
    "SDAA Driver": "none",
    "SDAA Runtime": "none",
    "TecoDNN": "none",
    "TecoBLAS": "none",
    "TCCL": "none (Gloo)",
}
print("-" * 49, *(f"| {name:<16} | {value:<26} |" for name, value in _TABLE.items()), "-" * 49, sep="\n")
