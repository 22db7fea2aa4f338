"""The train step and the eval step: Google's training curves, every compile form, donation, skipping, precision."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE, SMALL, expected, nchw

import vitfn
from vitfn import step as step_module
from vitfn import tree
from vitfn.data import load

FORMS = ["off", pytest.param("block", marks=pytest.mark.slow), pytest.param("step", marks=pytest.mark.slow)]
DROPPING = dataclasses.replace(SMALL, dropout_rate=0.1)

# The compiled tests share these, so that the graphs they compile are found in the compile cache.
OPTIMIZERS = {
    "sgd": vitfn.sgd(vitfn.warmup_cosine(0.03, 20, 2)),
    "adamw": vitfn.adamw(vitfn.warmup_cosine(1e-3, 20, 2)),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    reference = expected("token")
    return nchw(reference["images"]), torch.from_numpy(reference["labels"])


def fresh_state(optimizer, head: str = "keep") -> vitfn.TrainState:
    params = vitfn.load_npz(REFERENCE / "token.npz", SMALL)
    if head == "zero":
        params["head"] = tree.map(torch.zeros_like, params["head"])
    return vitfn.TrainState(0, params, optimizer.init(params))


def train(optimizer, steps: int, config=SMALL, state=None, **options) -> tuple[list[dict], vitfn.TrainState]:
    train_step = vitfn.make_train_step(config, optimizer, **options)
    state, history = state or fresh_state(optimizer), []
    for _ in range(steps):
        state, metrics = train_step(state, batch())
        history.append({name: float(value) for name, value in metrics.items()})
    assert train_step.failures == {}
    return history, state


CURVES = {
    "token_finetune": vitfn.warmup_cosine(0.03, 100, 10),
    "token_finetune_linear": vitfn.warmup_linear(0.03, 60, 5),
}
COMPILED_CURVES = [("token_finetune", "block"), ("token_finetune_linear", "block"), ("token_finetune", "step")]


@pytest.mark.parametrize(
    ("name", "form"),
    [*itertools.product(CURVES, ["off"]), *(pytest.param(*each, marks=pytest.mark.slow) for each in COMPILED_CURVES)],
)
@pytest.mark.filterwarnings("ignore:.*MD5")
def test_the_fine_tuning_curve_is_jax_s(name, form, cifar_dir):
    images, labels = load("cifar10", str(cifar_dir)).train
    reference, optimizer = expected(name), vitfn.sgd(CURVES[name])
    train_step = vitfn.make_train_step(SMALL, optimizer, compile=form)
    state, losses, norms = fresh_state(optimizer, head="zero"), [], []
    for t in range(len(reference["loss"])):
        part = slice(32 * t, 32 * (t + 1))
        state, metrics = train_step(state, ((images[part].float() - 127.5) / 127.5, labels[part]))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    assert train_step.form == form
    assert np.mean(np.abs(np.array(losses) / reference["loss"] - 1)) < 1e-6
    assert np.mean(np.abs(np.array(norms) / reference["grad_norm"] - 1)) < 2e-6
    for path, leaf in tree.flatten(state.params).items():
        want = reference.get(f"param_norm/{path}")
        if want is not None and not path.endswith("key/bias"):  # that one moves by rounding noise alone, in JAX
            assert math.isclose(float(leaf.norm()), want, rel_tol=1e-4), path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_form_takes_the_same_steps_dropout_included(form, name):
    """Compiled gradients are compared with eager ones through what they do to every parameter."""
    eager, eager_state = train(OPTIMIZERS[name], 8, DROPPING, compile="off", seed=3)
    history, state = train(OPTIMIZERS[name], 8, DROPPING, compile=form, seed=3)
    for mine, reference in zip(history, eager, strict=True):
        assert mine == pytest.approx(reference, rel=2e-5)
    for path, leaf in tree.flatten(state.params).items():
        reference = tree.flatten(eager_state.params)[path]
        # Adam divides gradients that are zero up to rounding by their own size
        torch.testing.assert_close(leaf, reference, rtol=1e-4, atol=2e-5 if name == "sgd" else 2e-4)


def test_the_first_loss_of_a_zero_head_is_log_of_the_classes_and_only_the_head_learns():
    optimizer = vitfn.sgd(vitfn.warmup_cosine(0.1, 10), momentum=0.0)
    before = fresh_state(optimizer, head="zero")
    train_step = vitfn.make_train_step(SMALL, optimizer, compile="off", donate=False)
    after, metrics = train_step(before, batch())
    assert math.isclose(metrics["loss"], math.log(10), rel_tol=1e-6)
    changed = tree.flatten(tree.map(lambda new, old: not torch.equal(new, old), after.params, before.params))
    moved = [path for path in changed if changed[path]]
    assert moved == ["head/kernel", "head/bias"]


def test_metrics_are_the_loss_the_unclipped_norm_and_the_rate_applied():
    optimizer = vitfn.sgd(vitfn.warmup_cosine(0.03, 100, 10))
    state = fresh_state(optimizer)
    images, labels = batch()
    grads, loss = torch.func.grad_and_value(lambda p: F.cross_entropy(vitfn.apply(p, images, SMALL), labels))(
        state.params
    )
    train_step = vitfn.make_train_step(SMALL, optimizer, compile="off", max_grad_norm=0.1)
    state, metrics = train_step(state, (images, labels))
    assert all(value.shape == () for value in metrics.values())
    assert math.isclose(metrics["loss"], loss, rel_tol=1e-5)
    assert math.isclose(metrics["grad_norm"], tree.norm(grads), rel_tol=1e-5)
    assert metrics["learning_rate"] == 0
    assert int(state.step) == 1
    state, metrics = train_step(state, (images, labels))
    assert math.isclose(metrics["learning_rate"], 0.003, rel_tol=1e-5)


def test_gradients_are_clipped_to_the_given_norm():
    optimizer = vitfn.sgd(lambda step: torch.tensor(1.0), momentum=0.0)
    before = fresh_state(optimizer)
    after, metrics = vitfn.make_train_step(SMALL, optimizer, compile="off", max_grad_norm=0.01, donate=False)(
        before, batch()
    )
    assert metrics["grad_norm"] > 0.01
    moved = tree.map(torch.sub, after.params, before.params)
    assert math.isclose(tree.norm(moved), 0.01, rel_tol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_donated_state_is_gone_and_its_memory_reused(form):
    train_step = vitfn.make_train_step(DROPPING, OPTIMIZERS["sgd"], compile=form)
    state = fresh_state(OPTIMIZERS["sgd"])
    addresses = [leaf.data_ptr() for leaf in tree.leaves(state.params) + tree.leaves(state.opt_state)]
    after, _ = train_step(state, batch())
    assert [leaf.data_ptr() for leaf in tree.leaves(after.params) + tree.leaves(after.opt_state)] == addresses
    with pytest.raises(RuntimeError, match="donated"):
        train_step(state, batch())
    for field in ("step", "params", "opt_state"):
        with pytest.raises(RuntimeError, match="donated"):
            getattr(state, field)


def test_without_donation_the_given_state_stays():
    optimizer = vitfn.adamw(vitfn.warmup_cosine(0.03, 10))
    train_step = vitfn.make_train_step(SMALL, optimizer, compile="off", donate=False)
    state = fresh_state(optimizer)
    before = tree.clone({"params": state.params, "opt_state": state.opt_state})
    first, second = train_step(state, batch()), train_step(state, batch())
    torch.testing.assert_close({"params": state.params, "opt_state": state.opt_state}, before, rtol=0, atol=0)
    torch.testing.assert_close(first[0].params, second[0].params, rtol=0, atol=0)
    assert int(state.step) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_step_whose_gradients_are_not_finite_changes_the_step_alone(form):
    train_step = vitfn.make_train_step(DROPPING, OPTIMIZERS["adamw"], compile=form, donate=False)
    images, labels = batch()
    state, _ = train_step(fresh_state(OPTIMIZERS["adamw"]), (images, labels))
    poisoned = images.clone()
    poisoned[0, 0, 0, 0] = math.nan
    after, metrics = train_step(state, (poisoned, labels))
    assert not metrics["grad_norm"].isfinite()
    torch.testing.assert_close((after.params, after.opt_state), (state.params, state.opt_state), rtol=0, atol=0)
    assert (int(state.step), int(after.step)) == (1, 2)


def test_dropout_follows_seed_and_step():
    optimizer = vitfn.sgd(lambda step: torch.tensor(0.0))  # parameters never move: what changes is the masks
    losses = {}
    for seed in (0, 1):
        losses[seed] = [metrics["loss"] for metrics in train(optimizer, 3, DROPPING, compile="off", seed=seed)[0]]
    assert len({*losses[0], *losses[1]}) == 6
    assert losses[0] == [metrics["loss"] for metrics in train(optimizer, 3, DROPPING, compile="off", seed=0)[0]]


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_half_precision_computes_in_half_and_keeps_float32_parameters(precision, tolerance):
    optimizer = vitfn.sgd(vitfn.warmup_cosine(0.03, 100))
    full, _ = train(optimizer, 3, compile="off")
    half, state = train(optimizer, 3, compile="off", precision=precision)
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(state.params) + tree.leaves(state.opt_state))
    losses = [[metrics["loss"] for metrics in history] for history in (half, full)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("form", FORMS)
def test_eval_step_counts_what_is_not_padding(form):
    params = vitfn.load_npz(REFERENCE / "token.npz", SMALL)
    eval_step = vitfn.make_eval_step(SMALL, compile=form)
    images, labels = batch()
    logits = vitfn.apply(params, images, SMALL)
    metrics = eval_step(params, (images, labels))
    assert int(metrics["correct"]) == int((logits.argmax(1) == labels).sum())
    assert int(metrics["count"]) == 4
    assert math.isclose(metrics["loss"], F.cross_entropy(logits, labels, reduction="sum"), rel_tol=1e-5)
    padded = eval_step(params, (images, torch.tensor([*labels[:3].tolist(), -1])))
    assert int(padded["count"]) == 3
    assert math.isclose(padded["loss"], F.cross_entropy(logits[:3], labels[:3], reduction="sum"), rel_tol=1e-5)


def test_grad_and_value_is_torch_func_s():
    params = {"w": torch.randn(3), "unused": torch.randn(2)}

    def loss(p):
        return (p["w"] ** 3).sum()

    torch.testing.assert_close(step_module.grad_and_value(loss)(params), torch.func.grad_and_value(loss)(params))
    assert not params["w"].requires_grad


def test_train_state_takes_a_python_step():
    state = vitfn.TrainState(7, {"w": torch.zeros(1)}, {})
    assert state.step.dtype == torch.int64
    assert state.step.shape == ()


@pytest.mark.parametrize("options", [{"precision": "float8"}, {"compile": "jit"}])
def test_unknown_options_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}: found .* expected one of"):
        vitfn.make_train_step(SMALL, vitfn.sgd(vitfn.warmup_cosine(0.1, 1)), **options)
