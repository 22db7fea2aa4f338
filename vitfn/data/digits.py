"""Scikit-learn's handwritten digits: 1,797 images that need no download (Alpaydin and Kaynak, UCI, 1998)."""

import torch
import torch.nn.functional as F

from vitfn.data.dataset import Dataset, Split
from vitfn.errors import InputError


def load() -> Dataset:
    """8x8 grey levels 0 to 16, as 32x32 RGB (bilinear); every fifth image, from index 4, is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--dataset=digits needs scikit-learn; install it with: pip install scikit-learn") from None
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # (N, 1, 8, 8)
    grey = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    images = grey.round().to(torch.uint8).repeat(1, 3, 1, 1)  # (N, 3, 32, 32)
    labels = torch.from_numpy(digits.target).long()
    testing = torch.arange(len(labels)) % 5 == 4
    return Dataset(
        train=Split(images[~testing], labels[~testing]),
        test=Split(images[testing], labels[testing]),
        class_names=tuple(str(name) for name in digits.target_names),
    )
