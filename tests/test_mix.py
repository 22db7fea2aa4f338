"""Labels, mixup and cutmix: the formulas, exactly, and the distributions they are drawn from."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from vitfn.data.mix import cutmix, mixup
from vitfn.losses import one_hot

KEYS = st.integers(0, 2**32 - 1)
IMAGES = torch.arange(4.0)[:, None, None, None].expand(4, 3, 12, 20)  # each pixel says whose it is


def targets(count: int = 4) -> Tensor:
    return one_hot(torch.arange(count), count)


def test_one_hot_has_a_one_where_the_label_is():
    found = one_hot(torch.tensor([2, 0, -1]), 3)
    assert found.dtype == torch.float32
    assert found.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_probabilities_stay_as_they_are():
    given = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    assert torch.equal(one_hot(given, 2), given.float())


@given(KEYS, st.floats(0.05, 5))
def test_mixup_blends_each_image_and_its_label_with_the_one_before(key, alpha):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed, labels = mixup(images, targets(), alpha, key)
    kept = float(labels[0, 0])
    assert 0.5 <= kept <= 1
    for i in range(4):
        torch.testing.assert_close(mixed[i], kept * images[i] + (1 - kept) * images[i - 1])
        torch.testing.assert_close(labels[i], kept * targets()[i] + (1 - kept) * targets()[i - 1])


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_s_weights_are_beta_s_larger_parts(alpha):
    """P(max(l, 1 - l) <= x) = 2 F(x) - 1."""
    image = torch.zeros(2, 1, 1, 1)
    weights = [float(mixup(image, targets(2).double(), alpha, key)[1][0, 0]) for key in range(2000)]
    assert stats.kstest(weights, lambda x: 2 * stats.beta.cdf(x, alpha, alpha) - 1).pvalue > 1e-3


@given(KEYS, st.floats(0.05, 5))
def test_cutmix_pastes_one_rectangle_and_weighs_labels_by_its_area(key, alpha):
    before = IMAGES.clone()
    mixed, labels = cutmix(before, targets(), alpha, key)
    assert torch.equal(before, IMAGES)  # the given images are left alone
    pasted = (mixed != IMAGES)[0, 0]  # (12, 20)
    assert torch.equal(pasted, pasted.any(1)[:, None] & pasted.any(0)[None])
    for side in (pasted.any(1), pasted.any(0)):
        assert int(side.diff().sum()) <= 2  # connected
    for i in range(4):
        assert torch.equal(mixed[i], torch.where(pasted, IMAGES[i - 1], IMAGES[i]))
        assert math.isclose(float(labels[i, i]), 1 - float(pasted.float().mean()), abs_tol=1e-6)
        assert math.isclose(float(labels[i, i - 1]), float(pasted.float().mean()), abs_tol=1e-6)


def yun(side: int, source: random.Random) -> float:
    """The part kept by the paper's algorithm for alpha 1: a square of area 1 - l about a uniform centre, cut off."""
    size = int(side * math.sqrt(1 - source.random()))
    spans = []
    for _ in range(2):
        centre = source.randrange(side)
        spans.append(min(centre + size // 2, side) - max(centre - size // 2, 0))
    return 1 - spans[0] * spans[1] / side**2


def test_cutmix_s_areas_are_the_paper_s():
    side, count = 64, 1000
    image = torch.zeros(2, 1, side, side)
    kept = [float(cutmix(image, targets(2).double(), 1.0, key)[1][0, 0]) for key in range(count)]
    source = random.Random(0)
    assert stats.ks_2samp(kept, [yun(side, source) for _ in range(count)]).pvalue > 1e-3


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_a_mix_is_a_function_of_its_key(mix):
    np.random.seed(0)
    first = mix(IMAGES, targets(), 1.0, 5)
    np.random.random(3)
    again = mix(IMAGES, targets(), 1.0, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({float(mix(IMAGES, targets(), 1.0, key)[1][0, 0]) for key in range(20)}) > 10


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_targets_keep_their_sum_and_type(mix):
    soft = torch.tensor([[0.5, 0.5, 0], [0.2, 0.3, 0.5], [1, 0, 0], [0.1, 0.1, 0.8]])
    mixed, labels = mix(IMAGES, soft, 0.8, 3)
    assert (mixed.dtype, labels.dtype, mixed.shape) == (torch.float32, torch.float32, IMAGES.shape)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    torch.testing.assert_close(labels.sum(0), soft.sum(0))
