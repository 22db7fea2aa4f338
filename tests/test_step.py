"""The train step and the eval step: Google's training curves, every compile form, donation, skipping, precision."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE, SMALL, expected, nchw

import vitfn
from vitfn import device, losses, optim, tree
from vitfn import step as step_module
from vitfn.data import load

FORMS = ["off", pytest.param("block", marks=pytest.mark.slow), pytest.param("step", marks=pytest.mark.slow)]
DROPPING = dataclasses.replace(SMALL, dropout_rate=0.1)

# The compiled tests share these, so that the graphs they compile are found in the compile cache.
OPTIMIZERS = {
    "sgd": vitfn.sgd(vitfn.warmup_cosine(0.03, 20, 2)),
    "adamw": vitfn.adamw(vitfn.warmup_cosine(1e-3, 20, 2)),
}
AVERAGED = optim.with_ema(OPTIMIZERS["adamw"], 0.9)
PROBE = vitfn.adamw(vitfn.warmup_cosine(1e-3, 20), rules=optim.Rules(frozen="(?!head/).*"))


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


@functools.cache
def cifar_batches(directory: str, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first batches of 32 real images that the reference curves were trained on, normalised."""
    images, labels = load("cifar10", directory).train
    parts = [slice(32 * t, 32 * (t + 1)) for t in range(steps)]
    return [((images[part].float() - 127.5) / 127.5, labels[part]) for part in parts]


def fine_tune(optimizer, directory, steps: int, config=SMALL, **options) -> tuple[np.ndarray, np.ndarray, dict]:
    """The loss and the gradients' norm of each step from a zero head, and the parameters."""
    train_step, state, history = vitfn.make_train_step(config, optimizer, **options), fresh_state(optimizer, "zero"), []
    for batch in cifar_batches(str(directory), steps):
        state, metrics = train_step(state, batch)
        history.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    assert train_step.form == options["compile"]
    losses, norms = np.array(history).T
    return losses, norms, state.params


def mean_relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    """Of unsigned errors, so that none cancel."""
    return float(np.mean(np.abs(found / reference - 1)))


COMPILED_CURVES = [("token_finetune", "block"), ("token_finetune_linear", "block"), ("token_finetune", "step")]


@pytest.mark.parametrize(
    ("name", "form"),
    [*itertools.product(CURVES, ["off"]), *(pytest.param(*each, marks=pytest.mark.slow) for each in COMPILED_CURVES)],
)
@pytest.mark.filterwarnings("ignore:.*MD5")
def test_the_fine_tuning_curve_is_jax_s(name, form, cifar_dir):
    reference = expected(name)
    found, norms, params = fine_tune(vitfn.sgd(CURVES[name]), cifar_dir, len(reference["loss"]), compile=form)
    assert mean_relative_error(found, reference["loss"]) < 1e-6
    assert mean_relative_error(norms, reference["grad_norm"]) < 2e-6
    for path, leaf in tree.flatten(params).items():
        want = reference.get(f"param_norm/{path}")
        if want is not None and not path.endswith("key/bias"):  # that one moves by rounding noise alone, in JAX
            assert math.isclose(float(leaf.norm()), want, rel_tol=1e-4), path


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "off") for name in OPTIMIZERS),
        ("sgd", "block"),
        pytest.param("adamw", "block", marks=pytest.mark.slow),
        pytest.param("sgd", "step", marks=[pytest.mark.slow, pytest.mark.oldest]),
        pytest.param("adamw", "step", marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.parametrize("form", ["off", "block", pytest.param("step", marks=pytest.mark.slow)])
def test_one_image_is_clipped_once(form, monkeypatch):
    """Of a single image, the class token's gradient is a view of its position's: nothing may scale both in place."""
    monkeypatch.setitem(device.DEVICES, "cpu", dataclasses.replace(device.DEVICES["cpu"], backend="aot_eager"))
    optimizer = vitfn.sgd(lambda step: torch.tensor(1.0), momentum=0.0)
    images, labels = (part[:1] for part in batch())
    before = fresh_state(optimizer)
    grads = torch.func.grad(lambda p: F.cross_entropy(vitfn.apply(p, images, SMALL), labels))(before.params)
    train_step = vitfn.make_train_step(SMALL, optimizer, compile=form, max_grad_norm=0.01, donate=False)
    after, _ = train_step(before, (images, labels))
    assert train_step.form == form
    factor = 0.01 / tree.norm(grads)
    moved = tree.map(torch.sub, before.params, after.params)
    torch.testing.assert_close(moved, tree.map(lambda leaf: factor * leaf, grads), rtol=1e-3, atol=2e-7)


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
    found = {}
    for seed in (0, 1):
        found[seed] = [metrics["loss"] for metrics in train(optimizer, 3, DROPPING, compile="off", seed=seed)[0]]
    assert len({*found[0], *found[1]}) == 6
    assert found[0] == [metrics["loss"] for metrics in train(optimizer, 3, DROPPING, compile="off", seed=0)[0]]


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_half_precision_computes_in_half_and_keeps_float32_parameters(precision, tolerance):
    optimizer = vitfn.sgd(vitfn.warmup_cosine(0.03, 100))
    full, _ = train(optimizer, 3, compile="off")
    half, state = train(optimizer, 3, compile="off", precision=precision)
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(state.params) + tree.leaves(state.opt_state))
    found, reference = ([metrics["loss"] for metrics in history] for history in (half, full))
    assert found == pytest.approx(reference, rel=tolerance)
    assert found != reference


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 2e-3), ("float16", 3e-4)])
@pytest.mark.filterwarnings("ignore:.*MD5")
def test_half_precision_follows_jax_s_float32_curve(precision, limit, cifar_dir):
    sgd = vitfn.sgd(CURVES["token_finetune"])
    found, _, _ = fine_tune(sgd, cifar_dir, 100, compile="off", precision=precision)
    error = mean_relative_error(found, expected("token_finetune")["loss"])
    assert 1e-6 < error < limit


# Frozen leaves


@pytest.mark.parametrize("form", FORMS)
def test_frozen_leaves_stay_to_the_bit_in_every_form(form):
    before = fresh_state(PROBE)
    assert [path for path in tree.flatten(before.opt_state) if "head/" not in path] == ["count"]
    start = tree.flatten(tree.clone(before.params))
    history, after = train(PROBE, 4, DROPPING, before, compile=form)
    for path, leaf in tree.flatten(after.params).items():
        assert torch.equal(leaf, start[path]) != path.startswith("head/"), path
    assert list(tree.flatten(after.params)) == list(start)
    eager, _ = train(PROBE, 4, DROPPING, compile="off")
    for mine, reference in zip(history, eager, strict=True):
        assert mine == pytest.approx(reference, rel=2e-5)


def test_the_gradient_s_norm_is_that_of_what_is_trained():
    params, (images, labels) = fresh_state(PROBE).params, batch()
    grads = torch.func.grad(lambda p: F.cross_entropy(vitfn.apply(p, images, SMALL), labels))(params)
    history, _ = train(PROBE, 1, compile="off")
    assert math.isclose(history[0]["grad_norm"], tree.norm(grads["head"]), rel_tol=1e-5)


def test_linear_probing_keeps_nothing_of_the_trunk_for_the_gradient():
    def kept(optimizer) -> list[torch.Size]:
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
            train(optimizer, 1, compile="off")
        return shapes

    assert any(17 in shape for shape in kept(OPTIMIZERS["adamw"]))  # tokens
    assert not any(17 in shape or 96 in shape for shape in kept(PROBE))
    assert sum(shape.numel() for shape in kept(PROBE)) < 4 * 48 + 48 * 10 + 10 * 4 * 10


@pytest.mark.parametrize("form", ["block", pytest.param("step", marks=pytest.mark.slow)])
def test_linear_probing_compiles_no_gradient_of_the_trunk(form, monkeypatch):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    def operators(optimizer) -> set[str]:
        names: set[str] = set()

        def backend(graph, inputs):
            names.update(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        row = dataclasses.replace(device.DEVICES["cpu"], backend=aot_autograd(fw_compiler=backend))
        monkeypatch.setitem(device.DEVICES, "cpu", row)
        train(optimizer, 1, compile=form)
        return {name for name in names if "sigmoid" in name or "layer_norm" in name}

    assert operators(PROBE) == {"aten.sigmoid.default", "aten.native_layer_norm.default"}
    assert operators(OPTIMIZERS["adamw"]) > operators(PROBE)


# Losses


def test_soft_targets_and_smoothing_and_the_sigmoid_are_what_is_minimised():
    (images, labels), optimizer = batch(), OPTIMIZERS["sgd"]
    weights = 0.7 * losses.one_hot(labels, 10) + 0.3 * losses.one_hot(labels.roll(1), 10)
    for loss in losses.LOSSES.values():
        train_step = vitfn.make_train_step(SMALL, optimizer, compile="off", loss=loss, label_smoothing=0.1)
        state = fresh_state(optimizer)
        want = loss(vitfn.apply(state.params, images, SMALL), weights, 0.1).mean()
        _, metrics = train_step(state, (images, weights))
        assert math.isclose(metrics["loss"], want, rel_tol=1e-5)


# Evaluation


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
    torch.testing.assert_close(metrics["losses"], F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(metrics["predicted"], logits.argmax(1))
    torch.testing.assert_close(metrics["confidence"], logits.softmax(1).amax(1))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)  # how many classes are ahead of the right one
    assert torch.equal(metrics["top5"], ranks < 5)
    padded = eval_step(params, (images, torch.tensor([*labels[:3].tolist(), -1])))
    assert (float(padded["losses"][3]), bool(padded["top5"][3])) == (0, False)
    assert int(padded["count"]) == 3
    assert math.isclose(padded["loss"], F.cross_entropy(logits[:3], labels[:3], reduction="sum"), rel_tol=1e-5)


@pytest.mark.parametrize("rank", [0, 4, 5, 9])
def test_top5_holds_the_five_best_classes(rank):
    params, (images, _) = fresh_state(OPTIMIZERS["sgd"]).params, batch()
    order = vitfn.apply(params, images, SMALL).argsort(1, descending=True)
    metrics = vitfn.make_eval_step(SMALL, compile="off")(params, (images, order[:, rank]))
    assert metrics["top5"].tolist() == [rank < 5] * 4
    assert int(metrics["correct"]) == 4 * (rank == 0)


def test_top5_of_three_classes_is_all_of_them():
    config = dataclasses.replace(SMALL, num_classes=3)
    metrics = vitfn.make_eval_step(config, compile="off")(
        vitfn.init(config, 0), (batch()[0], torch.tensor([0, 1, 2, -1]))
    )
    assert metrics["top5"].tolist() == [True, True, True, False]


def test_an_image_of_several_labels_is_right_where_all_its_classes_are():
    params, (images, _) = fresh_state(OPTIMIZERS["sgd"]).params, batch()
    logits = vitfn.apply(params, images, SMALL)
    labels = (logits > 0).float()
    labels[1, 3] = 1 - labels[1, 3]  # one class of ten wrong
    labels[3] = -1  # padding
    eval_step = vitfn.make_eval_step(SMALL, compile="off", loss=losses.sigmoid)
    metrics = eval_step(params, (images, labels))
    each = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), reduction="none").sum(-1)
    each[3] = 0
    torch.testing.assert_close(metrics["losses"], each)
    torch.testing.assert_close(metrics["loss"], each.sum())
    assert (int(metrics["correct"]), int(metrics["count"])) == (2, 3)
    assert torch.equal(metrics["predicted"], logits > 0)
    torch.testing.assert_close(metrics["confidence"], 1 / (1 + (-logits).exp()))
    assert "top5" not in metrics


def test_evaluation_in_half_precision_gives_float32_probabilities():
    params = fresh_state(OPTIMIZERS["sgd"]).params
    exact = vitfn.make_eval_step(SMALL, compile="off")(params, batch())
    half = vitfn.make_eval_step(SMALL, compile="off", precision="bfloat16")(params, batch())
    assert half["confidence"].dtype == half["losses"].dtype == torch.float32
    torch.testing.assert_close(half["losses"], exact["losses"], rtol=2e-2, atol=1e-2)
    assert not torch.equal(half["losses"], exact["losses"])


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
