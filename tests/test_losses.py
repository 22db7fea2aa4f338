"""Losses against their formulas in float64 numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitfn import losses

B, K = 6, 5
LOGITS = 3 * torch.randn(B, K, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
MIXED = torch.softmax(torch.randn(B, K, generator=torch.Generator().manual_seed(1)), -1)
SEVERAL = (torch.arange(B)[:, None] & (1 << torch.arange(K)) > 0).float()  # from no class at all to three


def numpy_softmax(logits: np.ndarray, weights: np.ndarray, smoothing: float) -> np.ndarray:
    """- sum over classes of w log p, the weights smoothed."""
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -((weights * (1 - smoothing) + smoothing / K) * log_p).sum(-1)


def numpy_sigmoid(logits: np.ndarray, weights: np.ndarray, smoothing: float) -> np.ndarray:
    """- sum over classes of w log p + (1 - w) log (1 - p), the weights smoothed."""
    p, w = 1 / (1 + np.exp(-logits)), weights * (1 - smoothing) + smoothing / 2
    return -(w * np.log(p) + (1 - w) * np.log(1 - p)).sum(-1)


FORMULAS = {"softmax": numpy_softmax, "sigmoid": numpy_sigmoid}
TARGETS = {"labels": LABELS, "mixed": MIXED, "several": SEVERAL}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_loss_is_its_formula(name, targets, smoothing):
    found = losses.LOSSES[name](LOGITS, TARGETS[targets], smoothing)
    weights = np.eye(K)[LABELS] if targets == "labels" else TARGETS[targets].double().numpy()
    np.testing.assert_allclose(found, FORMULAS[name](LOGITS.double().numpy(), weights, smoothing), rtol=1e-5)


@pytest.mark.parametrize("name", losses.LOSSES)
@given(st.lists(st.integers(0, K - 1), min_size=B, max_size=B), st.floats(0, 0.9))
def test_labels_are_their_one_hot_weights(name, labels, smoothing):
    labels, loss = torch.tensor(labels), losses.LOSSES[name]
    torch.testing.assert_close(
        loss(LOGITS, labels, smoothing), loss(LOGITS, losses.one_hot(labels, K), smoothing), rtol=1e-5, atol=1e-6
    )


def test_mixed_labels_cost_the_mixture_of_their_losses():
    """Mixup's own formula (Zhang et al., arXiv 1710.09412): cross-entropy is linear in the weights."""
    other = LABELS.roll(1)
    weights = 0.3 * losses.one_hot(LABELS, K) + 0.7 * losses.one_hot(other, K)
    want = 0.3 * losses.softmax(LOGITS, LABELS) + 0.7 * losses.softmax(LOGITS, other)
    torch.testing.assert_close(losses.softmax(LOGITS, weights), want)


def test_one_hot_knows_padding_and_leaves_weights_alone():
    assert losses.one_hot(torch.tensor([1, -1]), 3).tolist() == [[0, 1, 0], [0, 0, 0]]
    assert torch.equal(losses.one_hot(MIXED, K), MIXED)
    assert losses.one_hot(SEVERAL.to(torch.uint8), K).dtype == torch.float32
