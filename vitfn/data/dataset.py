"""What a dataset is."""

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    """Two splits that share nothing, and the names of the classes that their labels count."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
