"""Augmentation and resizing as functions of (images, seed, step), batched, on the images' device.

B batch, C channels, H and W height and width before, h and w after.
"""

import math

import torch
from torch import Tensor

from vitfn import rng
from vitfn.config import ViTConfig

_TRIES = 10
_RATIO = (3 / 4, 4 / 3)  # width / height


def normalise(images: Tensor, config: ViTConfig) -> Tensor:
    """Pixels 0 to 255 to what the model expects, (x / 255 - mean) / std: (B, C, H, W) float32."""

    def channels(value: float | tuple[float, ...]) -> Tensor:  # (1 or C, 1, 1), made where it is used
        values = value if isinstance(value, tuple) else (value,)
        return torch.stack([torch.full((1, 1), 255 * v, device=images.device) for v in values])

    return (images.float() - channels(config.mean)) / channels(config.std)


def _interpolation(start: Tensor, length: Tensor, size: int, out: int, flip: Tensor | None = None) -> Tensor:
    """Weights (B, out, size) that sample `length` pixels from `start` at `out` places: bilinear, half-pixel centres."""
    place = torch.arange(out, device=start.device).expand(len(start), out)
    if flip is not None:
        place = torch.where(flip[:, None], out - 1 - place, place)
    centre = start[:, None] + (place + 0.5) * (length[:, None] / out) - 0.5  # (B, out)
    centre = centre.clamp(start[:, None], start[:, None] + length[:, None] - 1)
    pixel = torch.arange(size, device=start.device)
    return (1 - (centre[:, :, None] - pixel).abs()).clamp(min=0)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, no antialiasing, aspect ratio ignored, as Google evaluates: (B, C, H, W) -> (B, C, h, w) float32."""
    zero = torch.zeros(1, device=images.device)
    rows = _interpolation(zero, zero + images.shape[2], images.shape[2], size[0])  # (1, h, H)
    columns = _interpolation(zero, zero + images.shape[3], images.shape[3], size[1])  # (1, w, W)
    return rows @ images.float() @ columns.mT


def random_resized_crop(
    images: Tensor, size: tuple[int, int], keys: Tensor, scale: float, flip: bool = False
) -> Tensor:
    """A random part of each image, resized: (B, C, H, W) and keys (B,) -> (B, C, h, w) float32.

    Area uniform in [scale, 1] of the image, log-ratio uniform between 3/4 and 4/3; after ten tries that do not fit,
    the largest centred part of an allowed ratio (Szegedy et al., arXiv 1409.4842; torchvision's sampler). Bilinear.
    With `flip`, half of them are mirrored left to right.
    """
    height, width = images.shape[2:]
    area, ratio, top, left, mirrored = rng.uniform(keys, 5, _TRIES).unbind(1)  # each (B, tries)
    area = height * width * (scale + (1 - scale) * area)
    ratio = torch.exp(math.log(_RATIO[0]) + (math.log(_RATIO[1]) - math.log(_RATIO[0])) * ratio)
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]  # (B,)
    x = (left[:, 0] * (width - w + 1)).floor()
    y = (top[:, 0] * (height - h + 1)).floor()
    whole_w = min(width, round(height * _RATIO[1]))
    whole_h = min(height, round(width / _RATIO[0]))
    none_fits = ~fits.any(1)
    x, w = torch.where(none_fits, (width - whole_w) // 2, x), torch.where(none_fits, whole_w, w)
    y, h = torch.where(none_fits, (height - whole_h) // 2, y), torch.where(none_fits, whole_h, h)
    rows = _interpolation(y, h, height, size[0])  # (B, h, H)
    columns = _interpolation(x, w, width, size[1], mirrored[:, 0] < 0.5 if flip else None)  # (B, w, W)
    return rows[:, None] @ images.float() @ columns[:, None].mT


def augment(images: Tensor, config: ViTConfig, *, seed: int, step: int, crop_min: float, flip: bool) -> Tensor:
    """A step's images, cropped, perhaps mirrored, and normalised: (B, C, H, W) uint8 -> (B, C, h, w) float32.

    A function of (seed, step) and each image's place in the batch. `crop_min` is the least part of an image's area to
    keep; at 1 a square image is only resized.
    """
    places = torch.arange(len(images), device=images.device)
    keys = rng.fold_in(rng.fold_in(rng.stream(seed, "augment"), step), places)
    return normalise(random_resized_crop(images, config.image_hw, keys, crop_min, flip), config)
