"""Reading the pickles that CIFAR comes in without building anything that could run."""

import io
import pickle
from typing import Any

import numpy as np


def unpickle(data: bytes) -> Any:
    """The object in a Python 2 pickle of numbers, strings, lists, dicts and byte arrays (objects with `array`).

    Raises whatever the unpickler raises for damaged data, and UnpicklingError for any other class or function.
    """
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()


class _Array:
    """A numpy array in a pickle: bytes and a shape."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, data = state
        if dtype.code != b"u1" or not isinstance(data, bytes):
            raise ValueError(f"array of {dtype.code!r}, expected bytes")
        self.array = np.frombuffer(bytearray(data), np.uint8).reshape(shape, order="F" if fortran_order else "C")


class _Dtype:
    def __init__(self, code: bytes, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        pass


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 spells a byte string in the old protocol."""
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    """Builds numbers, strings, lists, dicts and the two classes above; every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"refusing {module}.{name}")
        return _KNOWN[module, name]
