"""The loss scale: when it doubles, when it halves, where it stops, and what float16 training makes of it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from test_step import AVERAGED, DROPPING, FORMS, OPTIMIZERS, batch, fresh_state, train

import vitfn
from vitfn import device, scaling, tree

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(True), torch.tensor(False)


def state(scale: float, good: int = 0) -> dict:
    return {"scale": torch.tensor(scale), "good": torch.tensor(good)}


def values(scales: dict) -> tuple[float, int]:
    return float(scales["scale"]), int(scales["good"])


def test_it_begins_at_65536_or_at_what_is_given():
    assert values(scaling.init(CPU)) == (65536.0, 0)
    assert values(scaling.init(CPU, 128)) == (128.0, 0)
    assert scaling.init(CPU, 128)["scale"].dtype == torch.float32


def test_it_doubles_after_2000_good_updates_in_a_row():
    scales = scaling.init(CPU)
    for _ in range(1999):
        scales = scaling.adjusted(scales, GOOD)
    assert values(scales) == (65536.0, 1999)
    assert values(scaling.adjusted(scales, GOOD)) == (131072.0, 0)


def test_a_bad_update_halves_it_and_starts_counting_anew():
    assert values(scaling.adjusted(state(1024.0, 1999), BAD)) == (512.0, 0)
    assert values(scaling.adjusted(state(512.0, 0), GOOD)) == (512.0, 1)


@pytest.mark.parametrize(("scale", "good", "finite"), [(1.0, 0, BAD), (2.0**24, 1999, GOOD)])
def test_it_stays_between_1_and_2_to_the_24(scale, good, finite):
    assert values(scaling.adjusted(state(scale, good), finite)) == (scale, 0)


def test_the_given_state_is_left_alone():
    before = state(1024.0, 1999)
    scaling.adjusted(before, GOOD), scaling.adjusted(before, BAD)
    assert values(before) == (1024.0, 1999)


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 24), st.integers(1990, 1999))
def test_it_is_torch_s_grad_scaler_within_its_bounds(fates, exponent, good):
    """torch's own update of a scale, kept from 1 to 2^24 afterwards."""
    scales = state(2.0**exponent, good)
    scale, tracker = torch.tensor(2.0**exponent), torch.tensor(good, dtype=torch.int32)
    for finite in fates:
        scales = scaling.adjusted(scales, torch.tensor(finite))
        torch._amp_update_scale_(scale, tracker, torch.tensor(0.0 if finite else 1.0), 2.0, 0.5, 2000)
        scale.clamp_(1, 2.0**24)
        assert values(scales) == (float(scale), int(tracker))


# In the train step


def scaled(optimizer, scale: float, good: int = 7) -> vitfn.TrainState:
    state = fresh_state(optimizer)
    scales = {"scale": torch.tensor(scale), "good": torch.tensor(good)}
    return vitfn.TrainState(0, state.params, state.opt_state, scales)


@pytest.mark.parametrize("form", [*FORMS[:2], pytest.param("step", marks=[pytest.mark.slow, pytest.mark.full])])
def test_an_overflow_of_float16_is_skipped_and_halves_the_scale(form):
    """A scale of 2^24 takes the loss's own gradient beyond 65504; a quarter of a probability times 2^17 fits."""
    train_step = vitfn.make_train_step(SMALL, AVERAGED, compile=form, precision="float16", donate=False)
    before = scaled(AVERAGED, 2.0**24)
    after, metrics = train_step(before, batch())
    assert train_step.form == form
    assert metrics["loss"].isfinite()
    assert not metrics["grad_norm"].isfinite()
    assert metrics["loss_scale"] == 2**24
    torch.testing.assert_close((after.params, after.opt_state), (before.params, before.opt_state), rtol=0, atol=0)
    assert (int(after.step), float(after.scaling["scale"]), int(after.scaling["good"])) == (1, 2**23, 0)
    while not metrics["grad_norm"].isfinite():
        after, metrics = train_step(after, batch())
    assert 2**14 <= metrics["loss_scale"] <= 2**18
    assert int(after.scaling["good"]) == 1
    assert int(after.step) == 25 - math.log2(metrics["loss_scale"])
    assert not torch.equal(after.params["head"]["kernel"], before.params["head"]["kernel"])


def test_a_scale_changes_neither_the_loss_nor_the_gradients():
    """Powers of two, divided out again: float16's gradients differ by what underflows alone."""
    runs = {}
    for scale in (256.0, 4096.0):
        history, _ = train(OPTIMIZERS["sgd"], 3, compile="off", precision="float16", loss_scale=scale)
        assert [metrics["loss_scale"] for metrics in history] == [scale] * 3
        runs[scale] = [(metrics["loss"], metrics["grad_norm"]) for metrics in history]
    np.testing.assert_allclose(runs[256.0], runs[4096.0], rtol=1e-3)


def test_a_fixed_scale_never_moves():
    optimizer = OPTIMIZERS["sgd"]
    train_step = vitfn.make_train_step(SMALL, optimizer, compile="off", precision="float16", loss_scale=2.0**24)
    state, metrics = train_step(fresh_state(optimizer), batch())
    assert not metrics["grad_norm"].isfinite()
    state, metrics = train_step(state, batch())
    assert metrics["loss_scale"] == 2**24
    good = vitfn.make_train_step(SMALL, optimizer, compile="off", precision="float16", loss_scale=64.0)
    state, metrics = good(scaled(optimizer, 64.0, good=1999), batch())
    assert metrics["grad_norm"].isfinite()
    assert state.scaling["scale"] == 64


def test_the_scale_begins_at_65536_and_doubles_after_2000_good_updates():
    optimizer = OPTIMIZERS["sgd"]
    train_step = vitfn.make_train_step(SMALL, optimizer, compile="off", precision="float16")
    state, metrics = train_step(fresh_state(optimizer), batch())
    assert metrics["loss_scale"] == 65536
    assert int(state.scaling["good"]) == 1
    state, metrics = train_step(scaled(optimizer, 1024.0, good=1999), batch())
    assert (metrics["loss_scale"], state.scaling["scale"]) == (1024, 2048)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_only_float16_is_scaled(precision):
    train_step = vitfn.make_train_step(SMALL, OPTIMIZERS["sgd"], compile="off", precision=precision)
    state, metrics = train_step(scaled(OPTIMIZERS["sgd"], 2.0**24), batch())
    assert metrics.keys() == {"loss", "grad_norm", "learning_rate"}
    assert state.scaling is None


@pytest.mark.parametrize("parts", [1, 2])
def test_float16_accumulation_and_averages_wait_for_no_device(parts, monkeypatch):
    """A step on the meta device, where reading any value raises, goes through."""
    monkeypatch.setitem(device.DEVICES, "meta", device.DEVICES["cpu"])
    config = dataclasses.replace(DROPPING, stochastic_depth_rate=0.1)
    options = {"precision": "float16", "accumulation_steps": parts, "compile": "off", "label_smoothing": 0.1}
    state, (images, labels) = fresh_state(AVERAGED), batch()
    meta = vitfn.TrainState(state.step.to("meta"), *(tree.to(each, "meta") for each in (state.params, state.opt_state)))
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(meta.step)
    meta, metrics = vitfn.make_train_step(config, AVERAGED, **options)(meta, (images.to("meta"), labels.to("meta")))
    everything = (*metrics.values(), *tree.leaves(meta.params), *tree.leaves(meta.opt_state))
    assert all(value.device.type == "meta" for value in everything)
    assert {leaf.device.type for leaf in tree.leaves(meta.scaling)} == {"meta"}
