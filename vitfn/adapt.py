"""A model's leaves made those of another size: positions for another grid, a new head, other input channels."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfn.config import ViTConfig
from vitfn.errors import InputError
from vitfn.google import POSITIONS
from vitfn.vit import shapes


class Adaptation(NamedTuple):
    """What turns a model's leaves into another's: the config it reaches, functions by path, leaves that begin as zeros,
    and a line for each thing that was done.

    A function is given the leaf, and those `beside` it that it needs too, by their paths, as they were.
    """

    config: ViTConfig
    change: dict[str, Callable[..., Tensor]]
    beside: dict[str, tuple[str, ...]]
    zeros: tuple[str, ...]
    said: tuple[str, ...]


def adaptation(own: ViTConfig, target: ViTConfig) -> Adaptation:
    """From a model `own` towards `target`, as far as weights can be adapted; what else differs stays `own`'s."""
    found, expected = shapes(own), shapes(target)
    change: dict[str, Callable[..., Tensor]] = {}
    beside: dict[str, tuple[str, ...]] = {}
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
        method = target.posemb_resize or own.posemb_resize or "bilinear_corners"
        change[POSITIONS] = lambda leaf: resize_positions(leaf, own.grid, target.grid, method)
    if own.channels != target.channels:
        said.append(f"input channels: {own.channels} made {target.channels}")
        if own.resnet:
            _check_one_normalisation(own)
            change["conv_root/kernel"] = lambda leaf: resize_channels(leaf, own, target)
        else:
            change["embedding/kernel"] = lambda leaf: resize_channels(leaf, own, target)
            change["embedding/bias"] = lambda leaf, kernel: leaf + _shift(kernel, own, target)
            beside["embedding/bias"] = ("embedding/kernel",)
    same: dict[str, Any] = {
        "image_size": target.image_size,
        "channels": target.channels,
        "mean": target.mean,
        "std": target.std,
    }
    return Adaptation(dataclasses.replace(own, **fields, **same), change, beside, zeros, tuple(said))


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], method: str = "bilinear_corners"
) -> Tensor:
    """Position embeddings (1, N, D) of a grid (rows, columns) for another; a class token's entry stays as it is.

    `method` is one of config.RESIZES, each with the arithmetic of the code that has it: Google's in float64 as
    scipy.ndimage.zoom(order=1), which its checkpoint.py calls, the others in float32.
    """
    extra = positions.shape[1] - math.prod(old)  # 1 with a class token, else 0
    interpolation, *how = method.split("_")
    grid = positions[0, extra:].T.reshape(1, -1, *old)  # (1, D, rows, columns)
    if how == ["offset"]:
        scales = tuple((after + 0.1) / before for before, after in zip(old, new, strict=True))
        grid = F.interpolate(grid.float(), scale_factor=scales, mode=interpolation)
    else:
        grid = F.interpolate(
            grid.double() if interpolation == "bilinear" else grid.float(),
            new,
            mode=interpolation,
            align_corners=how == ["corners"],
            antialias=how == ["antialias"],
        )
    return torch.cat([positions[:, :extra], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def with_channels(config: ViTConfig, channels: int) -> ViTConfig:
    """The model of other input channels, of which all are normalised alike."""
    if channels == config.channels:
        return config
    return dataclasses.replace(config, channels=channels, mean=average(config.mean), std=average(config.std))


def average(values: float | tuple[float, ...]) -> float:
    """One number for all channels."""
    return sum(values) / len(values) if isinstance(values, tuple) else values


def _each(values: float | tuple[float, ...], channels: int) -> Tensor:
    return torch.tensor(values if isinstance(values, tuple) else (values,) * channels, dtype=torch.float64)


def _check_one_normalisation(own: ViTConfig) -> None:
    if any(isinstance(values, tuple) and len(set(values)) > 1 for values in (own.mean, own.std)):
        raise InputError(
            f"channels: found mean {own.mean} and std {own.std} of a hybrid, expected the same for all channels, since "
            "its first layer standardises its kernels and cannot take others up"
        )


def _sources(own: ViTConfig, target: ViTConfig) -> tuple[Tensor, float]:
    """The old channel that each term of the new kernel comes from, and what it is multiplied by."""
    if target.channels == 1:
        return torch.arange(own.channels), 1.0
    return torch.arange(target.channels) % own.channels, own.channels / target.channels


def resize_channels(kernel: Tensor, own: ViTConfig, target: ViTConfig) -> Tensor:
    """A first layer's kernel (height, width, C, D) for other input channels.

    One channel gets the sum, so that a grey image gives what it gave as RGB; several are the old ones in turn, scaled
    by their number as timm does it, so that equal channels give about what they gave. Where channels were normalised by
    different means and deviations, kernel and bias (see `_shift`) take that up.
    """
    source, factor = _sources(own, target)
    ratio = factor * _each(target.std, len(source)) / _each(own.std, own.channels)[source]
    terms = kernel[:, :, source] * ratio.to(kernel.dtype)[:, None]
    return terms.sum(dim=2, keepdim=True) if target.channels == 1 else terms


def _shift(kernel: Tensor, own: ViTConfig, target: ViTConfig) -> Tensor:
    """What other means add to the first layer's bias, (D,): a pixel's (m - mean) / std in all places of the kernel."""
    source, factor = _sources(own, target)
    moved = _each(target.mean, len(source)) - _each(own.mean, own.channels)[source]
    weights = factor * moved / _each(own.std, own.channels)[source]
    return (kernel[:, :, source].double() * weights[:, None]).sum((0, 1, 2)).to(kernel.dtype)
