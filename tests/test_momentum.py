"""Moments kept in bfloat16: Google's own training curves, every compile form, and checkpoints that keep their bits."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from test_optim import constant, make_tree
from test_step import mean_relative_error

import vitfn
from vitfn import device, optim, snapshot, tree
from vitfn.compile import leaf_by_leaf
from vitfn.data import load
from vitfn.step import TrainState

CURVES = SHARED / "reference" / "vt_momentum.npz"
CONFIG = vitfn.get_config("ViT-Nano_8", image_size=32, num_classes=10)
LIMITS = {"float32": 1e-6, "bfloat16": 1e-4}  # roundings to bfloat16 that fall the other way make the latter's noise
SLOW, OLDEST = pytest.mark.slow, pytest.mark.oldest
OTHER_CURVES = [("float32", "off"), *((dtype, form) for dtype in LIMITS for form in ("block", "step"))]


@functools.cache
def batches(directory: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The 200 of 64 real images each that the reference's model was trained on, normalised."""
    images, labels = load("cifar10", str(directory)).train
    parts = [torch.arange(64 * t, 64 * (t + 1)) % len(labels) for t in range(200)]
    return [((images[part].float() - 127.5) / 127.5, labels[part]) for part in parts]


@pytest.mark.parametrize(
    ("dtype", "form"),
    [("bfloat16", "off"), *(pytest.param(*each, marks=SLOW) for each in OTHER_CURVES)],
)
@pytest.mark.filterwarnings("ignore:.*MD5")
def test_the_curve_is_that_of_google_s_model_and_optax_s_chain(dtype, form, cifar_dir):
    """clip_by_global_norm(1), then sgd(0.03, 0.9, accumulator_dtype), by JAX 0.10.2 on a CPU."""
    if not CURVES.exists():
        pytest.skip("Google's curves are not part of the repository (../shared/reference is absent)")
    with np.load(CURVES) as arrays:
        flat = {name.removeprefix("params/"): torch.from_numpy(arrays[name]) for name in arrays if "params/" in name}
        expected = arrays[f"losses_{dtype}"]
    optimizer = vitfn.sgd(vitfn.warmup_cosine(0.03, 200, 20), momentum_dtype=getattr(torch, dtype))
    train_step, params = vitfn.make_train_step(CONFIG, optimizer, compile=form), tree.unflatten(flat)
    state, losses = vitfn.TrainState(0, params, optimizer.init(params)), []
    for batch in batches(cifar_dir):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert (train_step.form, train_step.failures) == (form, {})
    error = mean_relative_error(np.array(losses), expected)
    print(f"{dtype}, {form}: {error:.1e}")
    assert error < LIMITS[dtype]


OPTIMIZERS = {
    "sgd": vitfn.sgd(constant(0.1), weight_decay=0.1, momentum_dtype=torch.bfloat16),
    "adamw": vitfn.adamw(constant(0.1), weight_decay=0.1, mu_dtype=torch.bfloat16),
}


def updated(optimizer: optim.Optimizer, steps: int = 20, **options) -> tuple[dict, dict]:
    """Parameters and state after updates by random gradients, of which one is skipped."""
    params = make_tree(0)
    opt_state = optimizer.init(params)
    for step in range(steps):
        how = {"scale": torch.tensor(0.37), "finite": torch.tensor(step != 3)} | options
        params, opt_state = optimizer.update(make_tree(step + 1), opt_state, params, torch.tensor(step), **how)
    return params, opt_state


@pytest.mark.parametrize("name", [pytest.param("sgd", marks=[SLOW, OLDEST]), pytest.param("adamw", marks=SLOW)])
def test_compiled_for_each_leaf_moments_have_the_bits_of_eager_ones(name):
    """Parameters and nu are as near as where nothing is rounded: eager functions fuse what the compiler does not."""
    eager, compiled = (
        updated(OPTIMIZERS[name], through=through) for through in (optim.together, leaf_by_leaf(device.DEVICES["cpu"]))
    )
    moment = {"sgd": "momentum", "adamw": "mu"}[name]
    torch.testing.assert_close(compiled[1][moment], eager[1][moment], rtol=0, atol=0)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6 if name == "adamw" else 0)


def test_a_float32_moment_is_the_same_asked_for_or_not():
    for named, plain in (
        (vitfn.sgd(constant(0.1), momentum_dtype=torch.float32), vitfn.sgd(constant(0.1))),
        (vitfn.adamw(constant(0.1), mu_dtype=torch.float32), vitfn.adamw(constant(0.1))),
    ):
        torch.testing.assert_close(updated(named), updated(plain), rtol=0, atol=0)


def test_mu_is_rounded_where_it_is_stored_alone():
    """The update is by float32's mu, of the rounded one of the step before and of b1 as bfloat16 has it."""
    optimizer = vitfn.adamw(constant(0.1), mu_dtype=torch.bfloat16)
    params = {"p": torch.zeros(50)}
    opt_state, p = optimizer.init(params), torch.zeros(50, dtype=torch.float64)
    stored, nu = torch.zeros(50, dtype=torch.bfloat16), torch.zeros(50, dtype=torch.float64)
    for step in range(5):
        grad = torch.randn(50, generator=torch.Generator().manual_seed(step))
        params, opt_state = optimizer.update({"p": grad}, opt_state, params, torch.tensor(step))
        mu, nu = 0.8984375 * stored.double() + 0.1 * grad, 0.999 * nu + 0.001 * grad.double() ** 2
        p -= 0.1 * mu / (1 - 0.9 ** (step + 1)) / (nu / (1 - 0.999 ** (step + 1))).sqrt()
        stored = mu.bfloat16()
        assert torch.equal(opt_state["mu"]["p"], stored)
        torch.testing.assert_close(params["p"], p.float())
    assert opt_state["nu"]["p"].dtype == torch.float32


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_keeps_a_rounded_moment_s_bits(name):
    params, opt_state = updated(OPTIMIZERS[name])
    bad = tree.map(lambda leaf: leaf * torch.nan, params)
    after = OPTIMIZERS[name].update(bad, opt_state, params, torch.tensor(20), finite=torch.tensor(False))
    torch.testing.assert_close(after, (params, opt_state), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_snapshot_keeps_a_rounded_moment_s_bits(name, tmp_path):
    params, opt_state = updated(OPTIMIZERS[name])
    snapshot.write(tmp_path / "s.npz", snapshot._fields(TrainState(20, params, opt_state)), {})
    fresh = TrainState(0, make_tree(9), OPTIMIZERS[name].init(make_tree(9)))
    read, _ = snapshot.read(tmp_path / "s.npz", fresh)
    torch.testing.assert_close((read.params, read.opt_state), (params, opt_state), rtol=0, atol=0)
