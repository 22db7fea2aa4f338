"""Operations against torch's own counter, and the device's peak with a clock that is known."""

import dataclasses
import itertools
import time
from functools import partial

import pytest
import torch
from conftest import SMALL
from torch.utils.flop_counter import FlopCounterMode

import vitfn
from vitfn import resnet, step
from vitfn.flops import forward_flops, measured_peak, needed_flops


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"image_size": (16, 40), "channels": 1},
        {"classifier": "gap", "num_classes": 7, "num_layers": 1},
        {"classifier": "map", "num_heads": 6},
        {"representation_size": 40, "mlp_dim": 50},
        {"num_classes": 0, "posemb": "sincos2d"},
    ],
    ids=str,
)
def test_forward_flops_are_what_torch_counts(overrides):
    config = dataclasses.replace(SMALL, **overrides)
    params = vitfn.init(config)

    def of_one_more(capture: str | None) -> int:
        few, more = (torch.zeros(n, config.channels, *config.image_hw) for n in (2, 3))
        few, more = (counted(lambda x=x: vitfn.apply(params, x, config, capture=capture)) for x in (few, more))
        return more - few

    assert of_one_more(None) == needed_flops(config)
    if config.classifier != "map":  # whose head never makes keys and values
        assert of_one_more(".*") == forward_flops(config)


def test_a_hybrid_s_are_those_beside_its_stem():
    stem = vitfn.ResNetConfig((1, 1), 0.5)
    config = dataclasses.replace(SMALL, resnet=stem, patch_size=1)
    params, images = vitfn.init(config), torch.zeros(1, 3, 32, 32)
    beside = counted(lambda: vitfn.apply(params, images, config, capture=".*")) - counted(
        lambda: resnet.stem(params, images, stem)
    )
    assert forward_flops(config) == beside


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "overrides", [{}, {"classifier": "gap"}, {"num_layers": 1, "image_size": (16, 40), "mlp_dim": 50}], ids=str
)
def test_what_is_needed_is_the_class_token_s_in_the_last_block_and_no_gradient_of_images(overrides, training):
    config = dataclasses.replace(SMALL, **overrides)
    params, images = vitfn.init(config), torch.zeros(1, 3, *config.image_hw)

    def loss(params):
        return vitfn.apply(params, images, config).sum()

    call = partial(step.grad_and_value(loss) if training else loss, params)
    assert counted(call) == needed_flops(config, training)


def test_a_pooling_head_is_attention_of_one_query_and_an_mlp():
    config = dataclasses.replace(SMALL, classifier="map")
    D, M = config.hidden_size, config.mlp_dim
    attention = torch.nn.MultiheadAttention(D, config.num_heads, batch_first=True)
    tokens = torch.zeros(1, config.num_tokens, D)
    head = counted(lambda: attention(tokens[:, :1], tokens, tokens)) + 2 * (2 * D * M)
    assert forward_flops(config) == forward_flops(dataclasses.replace(config, classifier="gap")) + head


def test_with_average_pooling_a_forward_pass_needs_everything():
    config = dataclasses.replace(SMALL, classifier="gap")
    assert needed_flops(config) == forward_flops(config)


def test_the_last_block_of_a_vit_b_16_is_worth_8_percent():
    config = vitfn.get_config("B/16")
    assert needed_flops(config) / forward_flops(config) == pytest.approx(0.918, abs=0.001)


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


def test_a_product_of_the_largest_size_is_repeated_until_it_can_be_timed(monkeypatch):
    """On a device that takes 1 ms for whatever it is told: from 8192 on, 4 times as many products each time."""
    asked = []
    clock = itertools.accumulate(itertools.chain([0, 1e-3] * 3 * 7, [0, 4e-2] * 3))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda size, _, generator: asked.append(size) or randn(2, 2))
    assert measured_peak("cpu", torch.float32) == pytest.approx(4 * 2 * 8192**3 / 1e-3)
    assert asked == [256, 512, 1024, 2048, 4096, 8192, 8192, 8192]
