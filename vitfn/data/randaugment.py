"""RandAugment (Cubuk et al., arXiv 1909.13719): kornia's operations, batched; which image gets which is ours."""

import math

import torch
from torch import Tensor

from vitfn import rng
from vitfn.errors import InputError

_GREY = 128 / 255  # what lies outside of an image
_GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# The paper's fourteen.
OPERATIONS = (
    "identity", "autocontrast", "equalize", "posterize", "solarize", "color", "contrast", "brightness", "sharpness",
    *_GEOMETRY,
)  # fmt: skip


def randaugment(images: Tensor, keys: Tensor, num_ops: int, magnitude: float) -> Tensor:
    """`num_ops` random operations on each image, one after the other: (B, C, H, W) pixels 0 to 255, float32.

    `keys` (B,) are on the CPU, whatever device the images are on, so that nothing waits for it. The ranges are
    AutoAugment's, a linear scale of `magnitude` m from 0 (nothing changes but by the first two) to 10:

        autocontrast, equalize                   by channel
        posterize                                keeps 8 - round(0.4 m) bits
        solarize                                 inverts pixels of 256 - 25.6 m and more
        color, contrast, brightness, sharpness   blend by 1 ± 0.09 m with grey, mean grey, black, smoothed
        rotate                                   ± 3 m degrees about the centre
        shear_x, shear_y                         ± 0.03 m from the upper left corner
        translate_x, translate_y                 ± 0.045 m of the width or height

    The sign is random. Bilinear; outside is mid grey. Colour is left alone where there are not three channels. (Those
    of TensorFlow and big_vision begin at 0 bits, threshold 0 and factor 0.1 instead, and draw factors without a sign.)
    """
    choice, sign = rng.uniform(keys, 2, num_ops).unbind(1)  # each (B, num_ops)
    choice = (choice * len(OPERATIONS)).long()
    strength = torch.where(sign < 0.5, -1.0, 1.0) * (magnitude / 10)
    for n in range(num_ops):
        images = images.round()  # whole levels between operations, as in the originals
        for index, name in enumerate(OPERATIONS[1:], start=1):
            chosen = (choice[:, n] == index).nonzero()[:, 0]
            if len(chosen):
                here = chosen.to(images.device, non_blocking=True)
                images[here] = 255 * apply_operation(name, images[here] / 255, strength[chosen, n])
    return images


def apply_operation(name: str, x: Tensor, strength: Tensor) -> Tensor:
    """One of OPERATIONS on images (B, C, H, W) in [0, 1], with signed strengths (B,) in [-1, 1], on the CPU."""
    try:
        from kornia import enhance
        from kornia.geometry.transform import warp_affine
    except ImportError:
        raise InputError("--randaugment needs kornia; install it with: pip install kornia") from None
    if name in _GEOMETRY:
        height, width = x.shape[2:]
        matrices = _matrices(name, height, width, strength).to(x.device, non_blocking=True)
        return warp_affine(x - _GREY, matrices, (height, width), padding_mode="zeros", align_corners=True) + _GREY
    magnitude = float(strength[0].abs())  # a batch's images differ in sign
    factor = (1 + 0.9 * strength).to(x.device, non_blocking=True)
    match name:
        case "autocontrast":
            low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
            return torch.where(high > low, (x - low) / (high - low), x)
        case "equalize":
            return enhance.equalize(x)
        case "posterize":
            return enhance.posterize(x, torch.full((), 8 - round(4 * magnitude), device=x.device))
        case "solarize":
            return enhance.solarize(x, torch.full((), 256 / 255 * (1 - magnitude), device=x.device))
        case "color":
            return enhance.adjust_saturation_with_gray_subtraction(x, factor) if x.shape[1] == 3 else x
        case "contrast":
            return enhance.adjust_contrast_with_mean_subtraction(x, factor)
        case "brightness":
            return enhance.adjust_brightness_accumulative(x, factor)
        case "sharpness":
            return enhance.sharpness(x, factor)
    return x


def _matrices(name: str, height: int, width: int, strength: Tensor) -> Tensor:
    """Where each pixel (x, y) goes, as matrices (B, 2, 3)."""
    matrices = torch.eye(2, 3).repeat(len(strength), 1, 1)
    match name:
        case "rotate":
            angle = math.radians(30) * strength
            cos, sin = angle.cos(), angle.sin()
            x, y = (width - 1) / 2, (height - 1) / 2
            rows = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
            return torch.stack(rows, 1).reshape(-1, 2, 3)
        case "shear_x":
            matrices[:, 0, 1] = 0.3 * strength
        case "shear_y":
            matrices[:, 1, 0] = 0.3 * strength
        case "translate_x":
            matrices[:, 0, 2] = 0.45 * width * strength
        case "translate_y":
            matrices[:, 1, 2] = 0.45 * height * strength
    return matrices
