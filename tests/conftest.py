"""What the tests share: where reference numbers and data lie, and the small model that most of them use."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import vitfn

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"  # outputs of Google's own JAX code, with the weights they belong to
SHARED = ROOT.parent / "shared"

# Those of the models in tests/reference.
SMALL = vitfn.ViTConfig(
    name="small", patch_size=8, image_size=32, hidden_size=48, num_layers=3, num_heads=3, mlp_dim=96, num_classes=10
)


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def cifar_dir() -> Path:
    """The folder with part of the real CIFAR-10."""
    if not (SHARED / "data").is_dir():
        pytest.skip("real CIFAR-10 images are not part of the repository (../shared/data is absent)")
    return SHARED / "data"


def expected(name: str) -> dict[str, np.ndarray]:
    """The reference outputs of a model."""
    with np.load(REFERENCE / f"{name}.expected.npz") as arrays:
        return dict(arrays)


def nchw(images: np.ndarray) -> torch.Tensor:
    """JAX's images (B, H, W, C) as apply takes them: (B, C, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
