"""Operations against torch's own counter, and the device's peak with a clock that is known."""

import dataclasses
import itertools
import time

import pytest
import torch
from conftest import SMALL
from torch.utils.flop_counter import FlopCounterMode

import vitfn
from vitfn import resnet
from vitfn.flops import forward_flops, measured_peak


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"image_size": (16, 40), "channels": 1},
        {"classifier": "gap", "num_classes": 7, "num_layers": 1},
        {"classifier": "map"},
        {"representation_size": 40, "mlp_dim": 50},
        {"num_classes": 0, "posemb": "sincos2d"},
    ],
    ids=str,
)
def test_forward_flops_are_what_torch_counts(overrides):
    config = dataclasses.replace(SMALL, **overrides)
    images = torch.zeros(3, config.channels, *config.image_hw)
    assert counted(lambda: vitfn.apply(vitfn.init(config), images, config)) == 3 * forward_flops(config)


def test_a_hybrid_s_are_those_beside_its_stem():
    stem = vitfn.ResNetConfig((1, 1), 0.5)
    config = dataclasses.replace(SMALL, resnet=stem, patch_size=1)
    params, images = vitfn.init(config), torch.zeros(1, 3, 32, 32)
    beside = counted(lambda: vitfn.apply(params, images, config)) - counted(lambda: resnet.stem(params, images, stem))
    assert forward_flops(config) == beside


def test_vit_b_16_takes_the_35_gigaflops_that_are_known():
    """17.5 billion multiply-adds of DeiT-B, the same model (Liu et al., arXiv 2103.14030, table 1)."""
    assert forward_flops(vitfn.get_config("B/16")) == pytest.approx(2 * 17.5e9, rel=0.005)


def test_the_peak_is_operations_over_the_best_time(monkeypatch):
    """Products of 256 that take 0.5, 0.25 and 0.5 s are long enough to be timed."""
    clock = itertools.accumulate([0, 0.5, 0, 0.25, 0, 0.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measured_peak("cpu", torch.float32) == 2 * 256**3 / 0.25


def test_the_product_grows_until_it_takes_30_milliseconds(monkeypatch):
    clock = itertools.accumulate([0, 1e-3] * 3 + [0, 4e-2] * 3)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measured_peak("cpu", torch.float32) == pytest.approx(max(2 * 256**3 / 1e-3, 2 * 512**3 / 4e-2))
