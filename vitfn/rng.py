"""Randomness as a function: integer hashing in place of a generator's history.

Every random number is a hash of where it is used: (seed, use, step, sample, element), as `jax.random.fold_in`
does it. Eager and compiled code, one device and four, a run and its continuation then draw the same numbers.

Keys are integers in [0, 2**32), held in Python ints or int64 tensors; products stay below 2**63, so that nothing
overflows on any device. A hash is two rounds of xorshift and multiplication, a permutation of 32 bits, and `bits` has
a third (shifts and constants from C. Wellons' hash-prospector: its best of two rounds, and triple32's last).
"""

import zlib

import torch
from torch import Tensor

# Which numbers are drawn: it goes up whenever a stored number of tests/test_rng.py changes. Checkpoints keep it, for a
# run that went on with others would silently be another run.
VERSION = 2  # 1 had two rounds in `bits`

_MASK = 0xFFFFFFFF


def _mix(x, salt=0):
    """A permutation of 32 bits of which the upper ones depend on every bit of `x`; an int or an int64 tensor."""
    # Inductor traces an operand anew at each use, so every x ^ (x >> n) doubles what it traces: so keys are computed
    # outside of what is compiled, and what only the lower bits need is left out.
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    return ((x ^ (x >> 15) ^ salt) * 0x735A2D97) & _MASK


def fold_in(key, data):
    """A new key from a key and integer `data`, each an int or an int64 tensor; tensors broadcast."""
    x = _mix(key ^ (data & _MASK))
    return x ^ (x >> 15)


def stream(seed: int, use: str) -> int:
    """The key of one use of randomness ('dropout', 'augment', ...) under a seed."""
    return fold_in(fold_in(0x9E3779B9, seed), zlib.crc32(use.encode()))


def bits(key: Tensor, *shape: int) -> Tensor:
    """32 bits, the upper ones the best, for each of `shape` elements under each key: (*key.shape, *shape) int64."""
    index = torch.arange(torch.Size(shape).numel(), device=key.device).reshape(shape)
    key = key.reshape(*key.shape, *(1 for _ in shape))
    # The key enters twice: else keys that differ in their lower bits alone would share numbers, in another order.
    x = _mix(key ^ index, (key * 0x5BD1E995) & _MASK)
    # After two rounds alone elements at some distances are correlated: in masks of 2**24 elements at rate 0.5, of two
    # keys, 39 and 62 of the lags up to 65,535 had p < 1e-6; with a third round none has. It adds 1 % to the C++ code
    # that is compiled, and no measurable time to compiling (BUILD.md).
    return ((x ^ (x >> 15)) * 0x31848BAB) & _MASK


def uniform(key: Tensor, *shape: int) -> Tensor:
    """float32 numbers in [0, 1), multiples of 2**-24: (*key.shape, *shape)."""
    return (bits(key, *shape) >> 8).to(torch.float32) * 2.0**-24


def permutation(length: int, key: int) -> Tensor:
    """A permutation of range(length): (length,) int64 on the CPU."""
    return torch.argsort(bits(torch.tensor(key), length), stable=True)
