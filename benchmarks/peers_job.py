"""What all contenders of peers.py do: one batch again and again, by SGD with momentum, clipping and a cosine rate."""

from types import SimpleNamespace

import numpy as np

RATE, TOTAL = 0.001, 10_000  # of the cosine: its first value, and the steps until it is 0
MOMENTUM, CLIP = 0.9, 1.0  # of SGD, and of the gradient's global norm


def batch(job: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, C, H, W) float32 of noise, and labels (B,) int32: the same for every contender."""
    random, side = np.random.default_rng(0), job.config.image_size
    images = random.standard_normal((job.batch, job.config.channels, side, side), dtype=np.float32)
    return images, random.integers(0, job.config.num_classes, job.batch, dtype=np.int32)
