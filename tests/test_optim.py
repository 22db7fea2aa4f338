"""Optimizers against torch.optim and closed forms: decay, rules, averages, clipping and skipped updates."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st

import vitfn
from vitfn import optim, tree
from vitfn.errors import InputError


def make_tree(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": {"kernel": torch.randn(4, 3, generator=generator), "bias": torch.randn(3, generator=generator)},
        "b": torch.randn(2, 2, 2, generator=generator),
    }


def constant(rate: float) -> optim.Schedule:
    return lambda step: torch.tensor(rate)


def train_both(ours: optim.Optimizer, theirs: type, steps: int = 6, **arguments) -> tuple[dict, dict]:
    """The same random gradients given to vitfn's optimizer and to torch's."""
    params = make_tree(0)
    reference = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(params).items()}
    optimizer = theirs(reference.values(), **arguments)
    opt_state = ours.init(params)
    for step in range(steps):
        grads = make_tree(step + 1)
        params, opt_state = ours.update(grads, opt_state, params, torch.tensor(step))
        for path, grad in tree.flatten(grads).items():
            reference[path].grad = grad.clone()
        optimizer.step()
    return params, tree.unflatten({path: leaf.detach() for path, leaf in reference.items()})


@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torch_s(momentum, weight_decay):
    ours, theirs = train_both(
        vitfn.sgd(constant(0.1), momentum, weight_decay),
        torch.optim.SGD,
        lr=0.1,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("weight_decay", [0, 0.1])
def test_adamw_is_torch_s(weight_decay):
    ours, theirs = train_both(
        vitfn.adamw(constant(0.1), weight_decay=weight_decay), torch.optim.AdamW, lr=0.1, weight_decay=weight_decay
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make", [vitfn.sgd, vitfn.adamw])
@pytest.mark.parametrize("rate", [0.1, 1, np.float32(0.1)])
def test_a_number_is_a_constant_rate(make, rate):
    params, grads = make_tree(0), make_tree(1)
    results = []
    for optimizer in (make(rate, weight_decay=0.1), make(constant(float(rate)), weight_decay=0.1)):
        assert [float(optimizer.schedule(torch.tensor(step))) for step in (0, 7)] == 2 * [pytest.approx(rate)]
        results.append(optimizer.update(grads, optimizer.init(params), params, torch.tensor(3)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("make", [vitfn.sgd, vitfn.adamw])
@pytest.mark.parametrize("rate", ["0.1", None])
def test_what_is_neither_a_number_nor_a_schedule_is_refused(make, rate):
    with pytest.raises(InputError, match=rf"^schedule: found {rate!r}, expected a number or a function of the step$"):
        make(rate)


def test_sgd_s_closed_form():
    """Constant gradient g: after n steps p = p0 - rate g sum over k of (1 - momentum^k) / (1 - momentum)."""
    optimizer = vitfn.sgd(constant(0.5), momentum=0.8)
    params, grads = {"p": torch.zeros(3)}, {"p": torch.tensor([1.0, -2.0, 4.0])}
    opt_state = optimizer.init(params)
    for step in range(5):
        params, opt_state = optimizer.update(grads, opt_state, params, torch.tensor(step))
    total = sum((1 - 0.8**k) / (1 - 0.8) for k in range(1, 6))
    torch.testing.assert_close(params["p"], -0.5 * total * grads["p"])


def test_adamw_s_first_step_is_the_gradient_s_sign():
    optimizer = vitfn.adamw(constant(0.01))
    params, grads = {"p": torch.zeros(3)}, {"p": torch.tensor([3.0, -0.2, 50.0])}
    params, _ = optimizer.update(grads, optimizer.init(params), params, torch.tensor(0))
    torch.testing.assert_close(params["p"], -0.01 * grads["p"].sign(), rtol=1e-5, atol=0)


def test_adamw_corrects_its_bias_to_rounding():
    """1 - 0.999 in float32 is off by 1e-5 if it is computed as such."""
    params, grads = {"p": torch.zeros(2, dtype=torch.float64)}, {"p": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    optimizer = vitfn.adamw(lambda step: torch.tensor(1.0), eps=0.0)
    params, _ = optimizer.update(grads, optimizer.init(params), params, torch.tensor(0))
    torch.testing.assert_close(params["p"], -torch.ones(2, dtype=torch.float64), rtol=2e-7, atol=0)


OPTIMIZERS = {
    "sgd": vitfn.sgd(vitfn.warmup_cosine(0.1, 10, 2), weight_decay=0.1),
    "adamw": vitfn.adamw(vitfn.warmup_cosine(0.1, 10, 2), weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_leaves_its_arguments_alone(name):
    optimizer, params, grads = OPTIMIZERS[name], make_tree(0), make_tree(1)
    opt_state = optimizer.init(params)
    before = [tree.clone(each) for each in (grads, opt_state, params)]
    finite = torch.tensor(False)
    optimizer.update(grads, opt_state, params, torch.tensor(3), finite=finite)
    optimizer.update(grads, opt_state, params, torch.tensor(3))
    torch.testing.assert_close([grads, opt_state, params], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_donated_memory_is_reused_for_the_same_result(name):
    optimizer, params, grads = OPTIMIZERS[name], make_tree(0), make_tree(1)
    opt_state = optimizer.init(params)
    pure = optimizer.update(grads, opt_state, params, torch.tensor(3))
    addresses = [leaf.data_ptr() for leaf in tree.leaves(params)]
    donated = optimizer.update(grads, opt_state, params, torch.tensor(3), donate=True)
    torch.testing.assert_close(donated, pure, rtol=0, atol=0)
    assert [leaf.data_ptr() for leaf in tree.leaves(donated[0])] == addresses


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_changes_nothing_and_the_next_one_counts_on(name, poison):
    optimizer, params = OPTIMIZERS[name], make_tree(0)
    params, opt_state = optimizer.update(make_tree(1), optimizer.init(params), params, torch.tensor(2))
    bad = make_tree(2)
    bad["b"][0, 0, 0] = poison
    skipped = optimizer.update(bad, opt_state, params, torch.tensor(3), finite=torch.tensor(False))
    torch.testing.assert_close(skipped, (params, opt_state), rtol=0, atol=0)
    after = optimizer.update(make_tree(3), skipped[1], skipped[0], torch.tensor(4), finite=torch.tensor(True))
    torch.testing.assert_close(after, optimizer.update(make_tree(3), opt_state, params, torch.tensor(4)))


def test_adamw_survives_a_skipped_first_update():
    optimizer, params = OPTIMIZERS["adamw"], make_tree(0)
    bad = tree.map(lambda leaf: leaf * math.nan, make_tree(1))
    skipped = optimizer.update(bad, optimizer.init(params), params, torch.tensor(3), finite=torch.tensor(False))
    torch.testing.assert_close(skipped, (params, optimizer.init(params)), rtol=0, atol=0)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_clipping_bounds_the_norm_and_keeps_the_direction(scale, max_norm):
    grads = tree.map(lambda leaf: leaf * scale, make_tree(0))
    norm = tree.norm(grads)
    clipped = tree.map(lambda leaf: leaf * optim.clipping(norm, max_norm), grads)
    assert math.isclose(tree.norm(clipped), min(float(norm), max_norm), rel_tol=1e-5)
    ratio = clipped["b"] / grads["b"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, min(1, max_norm / float(norm))))


def test_clipping_zero_gradients_is_harmless():
    zero = tree.map(torch.zeros_like, make_tree(0))
    clipped = tree.map(lambda leaf: leaf * optim.clipping(tree.norm(zero), 1.0), zero)
    assert all((leaf == 0).all() for leaf in tree.leaves(clipped))


# Rules, weight decay, momentum's rounding and averages


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [(vitfn.sgd, torch.optim.SGD, {"momentum": 0.9}), (vitfn.adamw, torch.optim.AdamW, {})],
)
def test_decay_and_rates_by_path_are_torch_s_parameter_groups(ours, theirs, arguments):
    rules = optim.Rules(decayed=".*/kernel|b", rates=(("a/.*", 0.25), ("a/bias", 7.0)))  # the first that matches
    groups = {"a/kernel": (0.1, 0.25), "a/bias": (0.0, 0.25), "b": (0.1, 1.0)}  # weight decay, factor
    params, optimizer = make_tree(0), ours(constant(0.1), weight_decay=0.1, rules=rules)
    reference = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(params).items()}
    torch_s = theirs(
        [{"params": [reference[path]], "lr": 0.1 * rate, "weight_decay": wd} for path, (wd, rate) in groups.items()],
        **arguments,
    )
    opt_state = optimizer.init(params)
    for step in range(6):
        grads = make_tree(step + 1)
        params, opt_state = optimizer.update(grads, opt_state, params, torch.tensor(step))
        for path, grad in tree.flatten(grads).items():
            reference[path].grad = grad.clone()
        torch_s.step()
    torch.testing.assert_close(tree.flatten(params), {path: leaf.detach() for path, leaf in reference.items()})


@pytest.mark.parametrize("make", [vitfn.sgd, vitfn.adamw])
def test_big_vision_s_decay_knows_neither_the_rate_nor_the_momentum_nor_a_leaf_s_factor(make):
    """Without gradients, p shrinks by 1 - decay_schedule(t) weight_decay at each step, and by nothing else."""
    rules = optim.Rules(decayed="a/.*", rates=((".*", 0.5),))
    optimizer = make(constant(123.0), weight_decay=0.1, decay_schedule=lambda step: 1 / (1 + step), rules=rules)
    start = params = make_tree(0)
    opt_state = optimizer.init(params)
    for step in range(4):
        grads = tree.map(torch.zeros_like, params)
        params, opt_state = optimizer.update(grads, opt_state, params, torch.tensor(step))
    shrunk = math.prod(1 - 0.1 / (1 + step) for step in range(4))
    torch.testing.assert_close(params["a"], tree.map(lambda leaf: shrunk * leaf, start["a"]))
    assert torch.equal(params["b"], start["b"])


def test_big_vision_s_decay_is_of_the_old_value_and_beside_the_step():
    optimizer = vitfn.sgd(constant(0.5), momentum=0.8, weight_decay=0.1, decay_schedule=constant(0.3))
    params, grads = {"p": torch.tensor([2.0, -4.0])}, {"p": torch.tensor([1.0, 3.0])}
    after, _ = optimizer.update(grads, optimizer.init(params), params, torch.tensor(0))
    torch.testing.assert_close(after["p"], params["p"] - 0.5 * grads["p"] - 0.3 * 0.1 * params["p"])


def test_a_bfloat16_momentum_is_rounded_where_it_is_stored_alone():
    """optax's trace with an accumulator_dtype: the update is float32's, from the rounded trace of the step before."""
    optimizer = vitfn.sgd(constant(0.1), momentum=0.9, momentum_dtype=torch.bfloat16)
    params = {"p": torch.zeros(50)}
    opt_state, p, trace = optimizer.init(params), torch.zeros(50), torch.zeros(50, dtype=torch.bfloat16)
    for step in range(5):
        grad = torch.randn(50, generator=torch.Generator().manual_seed(step))
        params, opt_state = optimizer.update({"p": grad}, opt_state, params, torch.tensor(step))
        exact = 0.8984375 * trace.float() + grad  # 0.9 in bfloat16
        trace, p = exact.bfloat16(), p - 0.1 * exact
        assert not torch.equal(exact, trace.float())
        assert torch.equal(opt_state["momentum"]["p"], trace)
        torch.testing.assert_close(params["p"], p)


DEEP = dataclasses.replace(SMALL, num_layers=12, representation_size=8)
LAYERS = {  # how many layers below the head's whole rate, by Bao et al., section 'fine-tuning'
    "cls": 13,
    "embedding/kernel": 13,
    "embedding/bias": 13,
    "Transformer/posembed_input/pos_embedding": 13,
    "conv_root/kernel": 13,
    "gn_root/scale": 13,
    "block1/unit1/conv_proj/kernel": 13,
    "block2/unit1/gn3/bias": 13,
    "Transformer/encoderblock_0/LayerNorm_0/scale": 12,
    "Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias": 11,
    "Transformer/encoderblock_10/MultiHeadDotProductAttention_1/key/kernel": 2,
    "Transformer/encoderblock_11/LayerNorm_2/bias": 1,
    "Transformer/encoder_norm/scale": 0,
    "MAPHead_0/probe": 0,
    "MAPHead_0/MultiHeadDotProductAttention_0/out/kernel": 0,
    "pre_logits/kernel": 0,
    "head/bias": 0,
}


def test_layer_decay_s_factors_are_powers_by_depth():
    rules = optim.Rules(rates=optim.layer_decay(12, 0.75))
    for path, below in LAYERS.items():
        assert math.isclose(rules.rate(path), 0.75**below, rel_tol=1e-12), path


def test_layer_decay_knows_every_leaf_of_every_kind_of_model():
    """No leaf below the head has the whole rate, and all of a layer have the same."""
    stem = vitfn.ResNetConfig((1, 1), 0.5)
    for overrides in ({}, {"classifier": "map"}, {"resnet": stem, "patch_size": 1}, {"posemb": "sincos2d"}):
        rules = optim.Rules(rates=optim.layer_decay(12, 0.5))
        top = r"Transformer/encoder_norm/.*|MAPHead_0/.*|pre_logits/.*|head/.*"
        factors: dict[str, set[float]] = {}
        for path in vitfn.shapes(dataclasses.replace(DEEP, **overrides)):
            block = re.match(r"Transformer/(encoderblock_\d+)/", path)
            layer = "top" if re.fullmatch(top, path) else block[1] if block else "embedding"
            factors.setdefault(layer, set()).add(rules.rate(path))
        blocks = {f"encoderblock_{i}": {0.5 ** (12 - i)} for i in range(12)}
        assert factors == {"embedding": {0.5**13}, **blocks, "top": {1.0}}


@pytest.mark.parametrize("make", [vitfn.sgd, vitfn.adamw])
def test_frozen_leaves_have_no_state_and_stay_as_they_are(make):
    optimizer = optim.with_ema(make(constant(0.1), weight_decay=0.1, rules=optim.Rules(frozen="a/.*")), 0.9)
    start = params = make_tree(0)
    opt_state = optimizer.init(params)
    assert {path.rpartition("/")[2] for path in tree.flatten(opt_state)} <= {"b", "count"}
    for step in range(3):
        grads = optim.trained(make_tree(step + 1), optimizer.rules)
        assert list(grads) == ["b"]
        params, opt_state = optimizer.update(grads, opt_state, params, torch.tensor(step))
    torch.testing.assert_close(params["a"], start["a"], rtol=0, atol=0)
    assert not torch.equal(params["b"], start["b"])


def test_the_average_is_its_closed_form():
    """After n updates, the sum of all p_k, each weighted by 1 - d_k and by all later d."""
    optimizer = optim.with_ema(vitfn.sgd(constant(0.1)), 0.35)
    params = make_tree(0)
    opt_state, history = optimizer.init(params), [params["b"]]
    for step in range(8):
        params, opt_state = optimizer.update(make_tree(step + 1), opt_state, params, torch.tensor(step))
        history.append(params["b"])
    d = [min(0.35, (1 + k) / (10 + k)) for k in range(8)]
    assert d[0] == 0.1
    assert d[4] == 0.35
    want = math.prod(d) * history[0].double()
    for k in range(8):
        want += (1 - d[k]) * math.prod(d[k + 1 :]) * history[k + 1]
    torch.testing.assert_close(opt_state["ema"]["b"], want.float())


def test_a_long_average_weighs_the_new_value_to_rounding():
    """1 - 0.9999 in float32 is off by 2e-4 if it is computed as such."""
    optimizer = optim.with_ema(vitfn.sgd(constant(1.0), momentum=0.0), 0.9999)
    params, grads = {"p": torch.zeros(2, dtype=torch.float32)}, {"p": torch.tensor([-1.0, 2.0])}
    _, opt_state = optimizer.update(grads, optimizer.init(params), params, torch.tensor(1_000_000))
    torch.testing.assert_close(opt_state["ema"]["p"], -1e-4 * grads["p"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_leaves_the_average_alone(name):
    optimizer, params = optim.with_ema(OPTIMIZERS[name], 0.9), make_tree(0)
    params, opt_state = optimizer.update(make_tree(1), optimizer.init(params), params, torch.tensor(2))
    assert not torch.equal(opt_state["ema"]["b"], params["b"])
    bad = tree.map(lambda leaf: leaf * math.nan, make_tree(2))
    skipped = optimizer.update(bad, opt_state, params, torch.tensor(3), finite=torch.tensor(False))
    torch.testing.assert_close(skipped, (params, opt_state), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_average_changes_nothing_about_training_and_leaves_its_arguments_alone(name):
    plain, averaging, params, grads = (
        OPTIMIZERS[name],
        optim.with_ema(OPTIMIZERS[name], 0.9),
        make_tree(0),
        make_tree(1),
    )
    opt_state = averaging.init(params)
    before = [tree.clone(each) for each in (grads, opt_state, params)]
    pure = averaging.update(grads, opt_state, params, torch.tensor(3))
    torch.testing.assert_close([grads, opt_state, params], before, rtol=0, atol=0)
    trained, _ = plain.update(grads, plain.init(params), params, torch.tensor(3))
    torch.testing.assert_close(pure[0], trained, rtol=0, atol=0)
    donated = averaging.update(grads, opt_state, params, torch.tensor(3), donate=True)
    torch.testing.assert_close(donated, pure, rtol=0, atol=0)
    assert donated[1]["ema"]["b"].data_ptr() == opt_state["ema"]["b"].data_ptr()


def test_averaged_parameters_are_the_averages_and_the_frozen_leaves():
    optimizer = optim.with_ema(vitfn.sgd(constant(0.1), rules=optim.Rules(frozen="a/.*")), 0.9)
    params = make_tree(0)
    opt_state = optimizer.init(params)
    opt_state["ema"]["b"] = torch.full((2, 2, 2), 7.0)
    averaged = optim.averaged(params, opt_state)
    assert list(tree.flatten(averaged)) == list(tree.flatten(params))
    assert averaged["a"]["kernel"] is params["a"]["kernel"]
    assert (averaged["b"] == 7).all()
    assert optim.averaged(params, vitfn.sgd(constant(0.1)).init(params)) == params


def test_a_skipped_update_does_not_decay_in_big_vision_s_way():
    optimizer = vitfn.adamw(constant(0.1), weight_decay=0.1, decay_schedule=constant(1.0))
    params = make_tree(0)
    bad = tree.map(lambda leaf: leaf * math.inf, make_tree(1))
    after, _ = optimizer.update(bad, optimizer.init(params), params, torch.tensor(0), finite=torch.tensor(False))
    torch.testing.assert_close(after, params, rtol=0, atol=0)
