"""optax's own optimizers over given gradients: python optax_updates.py given.npz found.npz

A program of its own, since JAX warns of every fork of a process that it has run in, and tests fork. `given` has leaves
`params/PATH`, and `grads/PATH` with one more axis, of updates. `found` has `OPTIMIZER/params/PATH` and
`OPTIMIZER/moment/PATH`, with that axis too: parameters, and momentum or mu in float32, after each update.
"""

import os
import sys
from collections import defaultdict

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax


def kernels(params: dict) -> dict:
    return {path: path.endswith("kernel") for path in params}


OPTIMIZERS = {
    f"{name}, {dtype}": transformation
    for dtype in ("float32", "bfloat16")
    for name, transformation in {
        "sgd": optax.sgd(0.03, 0.9, accumulator_dtype=dtype),
        "sgd, L2": optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.03, 0.9, accumulator_dtype=dtype)),
        "adam": optax.adam(1e-3, mu_dtype=dtype),
        "adam, other betas": optax.adam(1e-3, 0.95, 0.98, mu_dtype=dtype),
        "adamw": optax.adamw(1e-3, weight_decay=0.1, mu_dtype=dtype),
        "big_vision's adam": optax.chain(
            optax.scale_by_adam(mu_dtype=dtype),
            optax.scale(1e-3),
            optax.add_decayed_weights(1e-4, kernels),
            optax.scale(-1),
        ),
    }.items()
}


def updates(transformation: optax.GradientTransformation, params: dict, grads: list[dict]) -> dict[str, np.ndarray]:
    """Parameters and moments after each update, compiled as Google's programs are."""

    @jax.jit
    def update(params, state, grads):
        changes, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    state, found = transformation.init(params), defaultdict(list)
    for now in grads:
        params, state = update(params, state, now)
        ((_, moment),) = (
            leaf for name in ("trace", "mu") for leaf in optax.tree_utils.tree_get_all_with_path(state, name)
        )
        for path in params:
            found[f"params/{path}"].append(np.asarray(params[path]))
            found[f"moment/{path}"].append(np.asarray(moment[path]).astype(np.float32))
    return {name: np.stack(leaves) for name, leaves in found.items()}


if __name__ == "__main__":
    with np.load(sys.argv[1]) as given:
        arrays = dict(given)
    params = {name.removeprefix("params/"): leaf for name, leaf in arrays.items() if name.startswith("params/")}
    count = len(next(leaf for name, leaf in arrays.items() if name.startswith("grads/")))
    grads = [{path: arrays[f"grads/{path}"][t] for path in params} for t in range(count)]
    found = {
        f"{name}/{leaf}": array
        for name, transformation in OPTIMIZERS.items()
        for leaf, array in updates(transformation, params, grads).items()
    }
    np.savez(sys.argv[2], **found)
