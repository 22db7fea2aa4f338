"""optax itself: its moments, in float32 and bfloat16, and its parameters, after each of 60 updates of random trees."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_optim import constant

import vitfn
from vitfn import optim, tree

if not importlib.util.find_spec("optax"):
    pytest.skip("optax is not installed (requirements-peers.txt)", allow_module_level=True)

pytestmark = pytest.mark.slow

SGD, ADAM = constant(0.03), constant(1e-3)
BIG_VISION = {"decay_schedule": constant(1.0), "rules": optim.Rules(decayed=".*kernel")}
OPTIMIZERS = {
    "sgd": lambda dtype: vitfn.sgd(SGD, momentum_dtype=dtype),
    "sgd, L2": lambda dtype: vitfn.sgd(SGD, weight_decay=1e-3, momentum_dtype=dtype),
    "adam": lambda dtype: vitfn.adamw(ADAM, mu_dtype=dtype),
    "adam, other betas": lambda dtype: vitfn.adamw(ADAM, 0.95, 0.98, mu_dtype=dtype),
    "adamw": lambda dtype: vitfn.adamw(ADAM, weight_decay=0.1, mu_dtype=dtype),
    "big_vision's adam": lambda dtype: vitfn.adamw(ADAM, weight_decay=1e-4, mu_dtype=dtype, **BIG_VISION),
}
UPDATES = 60


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    """Leaves of any sizes, params/PATH, and their gradients, grads/PATH: of 1e-6 to 10 by leaf, and tenfold in one."""
    generator, leaves = np.random.default_rng(0), {}
    for i in range(8):
        shape = tuple(generator.integers(1, 20, generator.integers(1, 4)).tolist())
        path = f"{i}/{'kernel' if len(shape) > 1 else 'bias'}"
        scale = 10 ** (generator.uniform(-6, 1) + generator.uniform(-1, 0, shape))
        leaves[f"params/{path}"] = generator.standard_normal(shape)
        leaves[f"grads/{path}"] = scale * generator.standard_normal((UPDATES, *shape))
    return {name: leaf.astype(np.float32) for name, leaf in leaves.items()}


@pytest.fixture(scope="module")
def found(given, tmp_path_factory) -> dict[str, np.ndarray]:
    """What optax makes of them."""
    folder = tmp_path_factory.mktemp("optax")
    np.savez(folder / "given.npz", **given)
    command = [sys.executable, Path(__file__).with_name("optax_updates.py"), "given.npz", "found.npz"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as arrays:
        return dict(arrays)


def under(leaves: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): torch.from_numpy(leaf.copy())
        for name, leaf in leaves.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_optax_s(name, dtype, given, found):
    """sgd's bfloat16 moments to the bit: no product is rounded, so the sums are the same however they are computed.

    With a penalty, and in Adam, a product is rounded in float32 or fused with the sum. Then a float32 moment differs by
    that, and one of bfloat16 where it lies so near to the middle of two numbers that the other is stored: seldom.
    """
    optimizer = OPTIMIZERS[name](getattr(torch, dtype))
    params, grads = (tree.unflatten(under(given, f"{kind}/")) for kind in ("params", "grads"))
    theirs = {kind: under(found, f"{name}, {dtype}/{kind}/") for kind in ("params", "moment")}
    opt_state, differing, numbers = optimizer.init(params), 0, 0
    for t in range(UPDATES):
        now = tree.map(lambda leaf, t=t: leaf[t], grads)
        params, opt_state = optimizer.update(now, opt_state, params, torch.tensor(t))
        moments = tree.flatten(opt_state["momentum" if "sgd" in name else "mu"])
        for path, leaf in tree.flatten(params).items():
            moment, expected = moments[path], theirs["moment"][path]
            assert moment.dtype == getattr(torch, dtype)
            differing, numbers = differing + int((moment.float() != expected[t]).sum()), numbers + leaf.numel()
            near = 1e-6 if dtype == "float32" else 2**-7
            assert (moment.float() - expected[t]).abs().max() <= near * expected.abs().max()
            expected = theirs["params"][path]
            assert (leaf - expected[t]).abs().max() <= 1e-6 * expected.abs().max()
    if dtype == "bfloat16":
        assert differing <= (0 if name == "sgd" else numbers / 1000)
