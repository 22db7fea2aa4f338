"""A model's leaves made those of another size: positions for another grid, a new head, other input channels."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfn.config import ViTConfig
from vitfn.google import POSITIONS
from vitfn.vit import shapes


class Adaptation(NamedTuple):
    """What turns a model's leaves into another's: the config it reaches, functions by path, leaves that begin as zeros,
    and a line for each thing that was done."""

    config: ViTConfig
    change: dict[str, Callable[[Tensor], Tensor]]
    zeros: tuple[str, ...]
    said: tuple[str, ...]


def adaptation(own: ViTConfig, target: ViTConfig) -> Adaptation:
    """From a model `own` towards `target`, as far as weights can be adapted; what else differs stays `own`'s."""
    found, expected = shapes(own), shapes(target)
    change: dict[str, Callable[[Tensor], Tensor]] = {}
    zeros: tuple[str, ...] = ()
    said = []
    fields: dict[str, Any] = {}
    if own.representation_size and not target.representation_size:
        fields["representation_size"] = None
        said.append(f"pre_logits {found['pre_logits/kernel']} dropped: the model has none")
    kernel, new = found.get("head/kernel"), expected.get("head/kernel")
    if own.num_classes != target.num_classes or (fields and new and kernel and kernel[0] != new[0]):
        fields["num_classes"] = target.num_classes
        zeros = ("head/kernel", "head/bias") if target.num_classes else ()
        said.append(f"head {kernel or 'none'} replaced by zeros {new}" if new else f"head {kernel} dropped")
    if own.grid != target.grid and own.posemb == target.posemb == "learn":
        (rows, columns), (new_rows, new_columns) = own.grid, target.grid
        said.append(f"position embeddings resized from {rows}x{columns} to {new_rows}x{new_columns} patches")
        change[POSITIONS] = lambda leaf: resize_positions(leaf, own.grid, target.grid)
    if own.channels != target.channels:
        said.append(f"input channels: {own.channels} made {target.channels}")
        change["conv_root/kernel" if own.resnet else "embedding/kernel"] = lambda leaf: resize_channels(
            leaf, target.channels
        )
    same: dict[str, Any] = {
        "image_size": target.image_size,
        "channels": target.channels,
        "mean": target.mean,
        "std": target.std,
    }
    return Adaptation(dataclasses.replace(own, **fields, **same), change, zeros, tuple(said))


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (1, N, D) of a grid (rows, columns) for another; a class token's entry stays as it is.

    Corner-aligned bilinear in float64: scipy.ndimage.zoom(order=1), which Google's checkpoint.py calls.
    """
    extra = positions.shape[1] - math.prod(old)  # 1 with a class token, else 0
    grid = positions[0, extra:].T.reshape(1, -1, *old).double()  # (1, D, rows, columns)
    grid = F.interpolate(grid, new, mode="bilinear", align_corners=True)
    return torch.cat([positions[:, :extra], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def resize_channels(kernel: Tensor, channels: int) -> Tensor:
    """A first layer's kernel (height, width, C, D) for other input channels, as timm does it.

    One channel gets the sum, so that a grey image gives what it gave as RGB; several are the old ones in turn, scaled
    by their number, so that equal channels give about what they gave.
    """
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(dim=2, keepdim=True)
    return kernel[:, :, torch.arange(channels) % old] * (old / channels)
