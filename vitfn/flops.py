"""Operations of a model, counted, and of a device, measured: together the utilisation of its matrix unit (MFU)."""

import time

import torch

from vitfn.config import ViTConfig


def forward_flops(config: ViTConfig) -> int:
    """Floating-point operations of the matrix products of one image's forward pass, two for a multiplication and its
    addition; of a hybrid without its stem. Training takes three times as many (Kaplan et al., arXiv 2001.08361, 2.1).

    These are the model's, by which MFU is defined (Chowdhery et al., arXiv 2204.02311, appendix B), however it is
    computed: see `needed_flops`.
    """
    return 2 * sum(_multiplications(config, needed=False))


def needed_flops(config: ViTConfig, training: bool = False) -> int:
    """The operations of one image that are left to do: a forward pass, or with `training` a backward pass as well.

    Where one query is left, the class token's in the last block or a pooling head's, no keys and values are made, and
    the rest is of that token; images get no gradient. What a batch needs once (a probe's query) and what a backward
    pass computes again (fused attention's scores) is not counted.
    """
    embedding, rest = _multiplications(config, needed=True)
    return 2 * (2 * embedding + 3 * rest if training else embedding + rest)


def _multiplications(config: ViTConfig, needed: bool) -> tuple[int, int]:
    """Of the patch embedding, and of all else."""
    N, D, M, (rows, columns) = config.num_tokens, config.hidden_size, config.mlp_dim, config.grid
    inputs = config.patch_size**2 * (config.resnet.features if config.resnet else config.channels)
    block = N * (4 * D * D + 2 * D * M + 2 * N * D)
    one_query = 2 * D * D + 2 * D * M + 2 * N * D * config.num_heads
    head = (config.representation_size or D) * config.num_classes + D * (config.representation_size or 0)
    if config.classifier == "map":
        head += one_query if needed else 2 * N * D * D + 2 * N * D + 2 * D * D + 2 * D * M
    last = one_query + 2 * D * D if needed and config.classifier == "token" else block
    return rows * columns * inputs * D, (config.num_layers - 1) * block + last + head


def measured_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product on the device: the best of several, large enough to be timed.

    Of random numbers, since zeros and ones cost some devices less power, and make them faster than any model is.
    """
    best, size, calls = 0.0, 256, 1
    while True:
        numbers = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        a = numbers.to(device, dtype)
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(calls):
                product = a @ a
            product[0, 0].item()  # waits for the device
            seconds = time.perf_counter() - start
            best = max(best, calls * 2 * size**3 / seconds)
        if seconds > 0.03:
            return best
        size, calls = (2 * size, 1) if size < 8192 else (size, 4 * calls)
