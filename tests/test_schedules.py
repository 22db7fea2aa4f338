"""Schedules at points, within bounds, and the seed's own table of learning rates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitfn
from vitfn.schedules import constant, one_ahead


def test_a_constant_is_a_float32_tensor_where_the_step_is():
    for step in (0, torch.tensor(3), torch.tensor(10**6, device="meta")):
        rate = constant(0.25)(step)
        assert (rate.dtype, rate.shape, rate.device) == (torch.float32, (), torch.as_tensor(step).device)
    assert constant(0.25)(torch.tensor(3)) == 0.25


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


# Of the seed's LambdaLR, stepped before the optimizer (../shared/facts/jeonsworld.md, 1.5): update from 1 -> rate.
SEED_S_COSINE = {1: 6e-5, 10: 6e-4, 100: 6e-3, 500: 0.03, 5250: 0.015, 9999: 8.2e-10, 10000: 0}
SEED_S_LINEAR = {1: 6e-5, 500: 0.03, 5250: 0.015, 9999: 0.03 / 9500, 10000: 0}
SEED_S_SHORT_COSINE = {1: 3e-4, 100: 0.03, 300: 0.015, 499: 4.626e-7, 500: 0}


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        (vitfn.warmup_cosine(0.03, 10_000, 500), SEED_S_COSINE),
        (vitfn.warmup_linear(0.03, 10_000, 500, floor=0.0), SEED_S_LINEAR),
        (vitfn.warmup_cosine(0.03, 500, 100), SEED_S_SHORT_COSINE),
    ],
)
def test_one_ahead_is_the_seed_s_table(schedule, table):
    for update, rate in table.items():
        found = one_ahead(schedule)(torch.tensor(update - 1))
        assert math.isclose(found, rate, rel_tol=1e-5, abs_tol=2e-9), update  # 1 + cos(x) in float32 near pi


def test_one_ahead_is_torch_s_lambda_lr_stepped_before_the_optimizer():
    def factor(step: int) -> float:
        return step / 5 if step < 5 else max(0.0, 0.5 * (1 + math.cos(math.pi * (step - 5) / 15)))

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.03)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    schedule = one_ahead(vitfn.warmup_cosine(0.03, 20, 5))
    for step in range(20):
        optimizer.step()  # does nothing without gradients: torch warns of a scheduler that goes first
        scheduler.step()
        assert math.isclose(schedule(torch.tensor(step)), scheduler.get_last_lr()[0], rel_tol=1e-5, abs_tol=1e-8)
