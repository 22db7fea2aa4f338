"""Optimizers against torch.optim and closed forms, schedules at points, clipping and skipped updates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitfn
from vitfn import optim, tree


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


def test_warmup_cosine_at_points():
    schedule = vitfn.warmup_cosine(0.03, 100, 10)
    for step, rate in {0: 0, 5: 0.015, 10: 0.03, 55: 0.015, 100: 0, 120: 0}.items():
        assert math.isclose(schedule(torch.tensor(step)), rate, rel_tol=1e-5, abs_tol=1e-8)
    assert math.isclose(schedule(99), 0.015 * (1 + math.cos(math.pi * 89 / 90)), rel_tol=1e-3)


def test_warmup_linear_at_points():
    schedule = vitfn.warmup_linear(0.03, 60, 5)
    for step, rate in {0: 0, 1: 0.006, 5: 0.03, 60: 1e-5, 70: 1e-5}.items():
        want = rate * min(1, 1) if step != 1 else (1e-5 + (0.03 - 1e-5)) / 5
        assert math.isclose(schedule(torch.tensor(step)), want, rel_tol=1e-5, abs_tol=1e-9)
    assert math.isclose(schedule(torch.tensor(32.5)), (0.03 + 1e-5) / 2, rel_tol=1e-5)


def test_google_multiplies_decay_and_warmup():
    """During warm-up the decay factor is that of progress 0."""
    assert math.isclose(vitfn.warmup_cosine(1.0, 100, 50)(25), 0.5, rel_tol=1e-6)


@pytest.mark.parametrize("make", [vitfn.warmup_cosine, vitfn.warmup_linear])
def test_no_warmup_starts_at_the_peak_and_warmup_may_outlast_training(make):
    assert math.isclose(make(0.1, 10)(0), 0.1, rel_tol=1e-6)
    assert math.isclose(make(0.1, 10, 20)(9), 0.045, rel_tol=1e-5)


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 2000))
def test_rates_stay_between_zero_and_the_peak(total, warmup, step):
    for make in (vitfn.warmup_cosine, vitfn.warmup_linear):
        rate = make(0.1, total, warmup)(torch.tensor(step))
        assert rate.dtype == torch.float32
        assert 0 <= float(rate) <= 0.1 * (1 + 1e-6)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_clipping_bounds_the_norm_and_keeps_the_direction(scale, max_norm):
    grads = tree.map(lambda leaf: leaf * scale, make_tree(0))
    norm = tree.norm(grads)
    clipped = optim.clip_by_global_norm(tree.clone(grads), norm, max_norm)
    assert math.isclose(tree.norm(clipped), min(float(norm), max_norm), rel_tol=1e-5)
    ratio = clipped["b"] / grads["b"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, min(1, max_norm / float(norm))))


def test_clipping_zero_gradients_is_harmless():
    zero = tree.map(torch.zeros_like, make_tree(0))
    clipped = optim.clip_by_global_norm(zero, tree.norm(zero), 1.0)
    assert all((leaf == 0).all() for leaf in tree.leaves(clipped))
