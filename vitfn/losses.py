"""Losses of each image: functions of logits (B, K) and of targets, labels (B,) or weights of the classes (B, K)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]  # (logits (B, K), targets (B,) or (B, K), smoothing) -> (B,)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B,) as weights (B, K) float32, -1 as no class at all; weights stay what they are."""
    if labels.ndim == 2:
        return labels.float()
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def softmax(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with one distribution over the classes: (B, K) -> (B,).

    `smoothing` of the weight goes to all classes alike (Szegedy et al., arXiv 1512.00567, section 7).
    """
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


def sigmoid(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum over classes of binary cross-entropies: (B, K) -> (B,); for labels that do not exclude each other.

    Beyer et al., arXiv 2006.07159, and big_vision. `smoothing` moves each weight w to w + smoothing (1/2 - w).
    """
    weights = one_hot(targets, logits.shape[-1])
    weights = weights + smoothing * (0.5 - weights)
    return F.binary_cross_entropy_with_logits(logits, weights, reduction="none").sum(-1)


LOSSES: dict[str, Loss] = {"softmax": softmax, "sigmoid": sigmoid}
