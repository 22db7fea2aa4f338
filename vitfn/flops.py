"""Operations of a model, counted, and of a device, measured: together the utilisation of its matrix unit (MFU)."""

import time

import torch

from vitfn.config import ViTConfig


def forward_flops(config: ViTConfig) -> int:
    """Floating-point operations of the matrix products of one image's forward pass, two for a multiplication and its
    addition; of a hybrid without its stem. Training takes three times as many (Kaplan et al., arXiv 2001.08361, 2.1).
    """
    N, D, M, (rows, columns) = config.num_tokens, config.hidden_size, config.mlp_dim, config.grid
    inputs = config.patch_size**2 * (config.resnet.features if config.resnet else config.channels)
    block = N * (4 * D * D + 2 * D * M) + 2 * N * N * D
    head = (config.representation_size or D) * config.num_classes + D * (config.representation_size or 0)
    if config.classifier == "map":  # keys and values of all tokens, one query
        head += 2 * N * D * D + 2 * N * D + 2 * D * D + 2 * D * M
    return 2 * (rows * columns * inputs * D + config.num_layers * block + head)


def measured_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product on the device: the best of several, large enough to be timed."""
    best, size = 0.0, 256
    while True:
        a = torch.ones(size, size, dtype=dtype, device=device)
        for _ in range(3):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            seconds = time.perf_counter() - start
            best = max(best, 2 * size**3 / seconds)
        if seconds > 0.03 or size >= 8192:
            return best
        size *= 2
