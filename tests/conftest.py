"""What the tests share: where reference numbers and data lie, and the small model that most of them use."""

import one_thread as one_thread  # before torch

# isort: split
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from simulated.running import sdaa as sdaa

import vitfn
from vitfn import tree

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"  # outputs of Google's own JAX code, with the weights they belong to
SHARED = ROOT.parent / "shared"

# Those of the models in tests/reference.
SMALL = vitfn.ViTConfig(
    name="small", patch_size=8, image_size=32, hidden_size=48, num_layers=3, num_heads=3, mlp_dim=96, num_classes=10
)


# The command's smallest run: digits need no file, and the model is small.
NANO = ["--dataset=digits", "--model_type=ViT-Nano_8", "--img_size=32", "--pretrained_dir=", "--train_batch_size=16"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with most slow tests first: processes that share files then end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


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


def without_bar(stderr: str) -> str:
    """What a command says, but for its progress, which is drawn where something takes more than two seconds."""
    return "\n".join(line.rpartition("\r")[2] for line in stderr.split("\n"))


def nchw(images: np.ndarray) -> torch.Tensor:
    """JAX's images (B, H, W, C) as apply takes them: (B, C, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def assert_gradients(grads: dict, reference: dict[str, np.ndarray], exact: dict | None = None) -> None:
    """Each array within 1e-5 of JAX's, relative to its own norm or to a thousandth of the whole gradient's.

    Or, where `exact` gradients in float64 are given, nearer to them than JAX's own are, which have to be within it too.
    """
    want = {name.removeprefix("grad/"): value for name, value in reference.items() if name.startswith("grad/")}
    flat = tree.flatten(grads)
    assert flat.keys() == want.keys()
    whole = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in want.values()))
    for name, value in want.items():
        found = flat[name].numpy()
        if value.ndim == 4 and value.shape[:3] == (1, 1, 1):  # group normalisation, as files before flax 0.3.6 have it
            value = value.reshape(-1)
        assert found.shape == value.shape, name
        limit = 1e-5 * max(np.linalg.norm(value), 1e-3 * whole)
        close = np.linalg.norm(found - value) <= limit
        if exact is not None:
            truth = tree.flatten(exact)[name].numpy()
            close = close or np.linalg.norm(found - truth) <= np.linalg.norm(value - truth) <= limit
        assert close, name
