"""Pairs of images and their labels. Each image's partner is the one before it in the batch."""

import math

import numpy as np
from torch import Tensor


def mixup(images: Tensor, targets: Tensor, alpha: float, key: int) -> tuple[Tensor, Tensor]:
    """l x + (1 - l) x' for images (B, C, H, W) and targets (B, K) alike (Zhang et al., arXiv 1710.09412).

    One l ~ Beta(alpha, alpha) a batch, or 1 - l if that is larger, as big_vision does it: a function of `key`.
    """
    kept = _generator(key).beta(alpha, alpha)
    return _blend(images, max(kept, 1 - kept)), _blend(targets, max(kept, 1 - kept))


def cutmix(images: Tensor, targets: Tensor, alpha: float, key: int) -> tuple[Tensor, Tensor]:
    """A box of the partner pasted into each image, targets by area (Yun et al., arXiv 1905.04899).

    Images (B, C, H, W), targets (B, K). One box a batch, a function of `key`: of 1 - l of the area, l ~ Beta(alpha,
    alpha), its centre anywhere, cut off at the edges. Targets are weighted by the pixels that were kept.
    """
    height, width = images.shape[2:]
    generator = _generator(key)
    side = math.sqrt(1 - generator.beta(alpha, alpha))
    top, bottom = _span(height, side, generator.random())
    left, right = _span(width, side, generator.random())
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
    return mixed, _blend(targets, 1 - (bottom - top) * (right - left) / (height * width))


def _generator(key: int) -> np.random.Generator:
    """On the host, so that no device is waited for."""
    return np.random.Generator(np.random.Philox(key=key))


def _blend(x: Tensor, kept: float) -> Tensor:
    return kept * x + (1 - kept) * x.roll(1, 0)


def _span(length: int, part: float, centre: float) -> tuple[int, int]:
    """Where `part` of `length` starts and ends around `centre` (0 to 1), within 0 and `length`."""
    size = round(length * part)
    start = int(length * centre) - size // 2
    return max(start, 0), min(start + size, length)
