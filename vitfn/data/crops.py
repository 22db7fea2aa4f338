"""Which part of an image is kept, and its resizing: all take pixels 0 to 255, uint8 or float, and give float32.

B batch, C channels, H and W height and width before, h and w after.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfn import rng

SAMPLERS = ("torchvision", "google")
Boxes = tuple[Tensor, Tensor, Tensor, Tensor]  # y, x, h, w, each (B,) float32 of whole numbers


def random_boxes(
    height: int, width: int, keys: Tensor, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Boxes, Tensor]:
    """Boxes of random size at random places, and whether one was found: keys (B,) -> ((y, x, h, w), found), each (B,).

    Area uniform in `area`, parts of the image; width / height log-uniform in `ratio`; the first of ten tries that fits.
    """
    part, shape, top, left = rng.uniform(keys, 4, 10).unbind(1)  # each (B, tries)
    pixels = height * width * (area[0] + (area[1] - area[0]) * part)
    shape = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
    w, h = (pixels * shape).sqrt().round(), (pixels / shape).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    h, w, found = _first(fits, h, w)
    return ((top[:, 0] * (height - h + 1)).floor(), (left[:, 0] * (width - w + 1)).floor(), h, w), found


def crop_boxes(height: int, width: int, keys: Tensor, scale: float, sampler: str = "torchvision") -> Boxes:
    """Random parts of at least `scale` of an image's area: keys (B,) -> (y, x, h, w), each (B,).

    'torchvision': area uniform, log-ratio uniform between 3/4 and 4/3, else the largest centred part of an allowed
    ratio (Szegedy et al., arXiv 1409.4842). 'google': TensorFlow's sample_distorted_bounding_box as vision_transformer
    and big_vision call it: the height is uniform, not the area, and no crop touches the lower or right edge that has
    room to move.
    """
    if sampler == "google":
        return _google_boxes(height, width, keys, scale)
    boxes, found = random_boxes(height, width, keys, (scale, 1), (3 / 4, 4 / 3))
    h, w = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return _otherwise(found, boxes, ((height - h) // 2, (width - w) // 2, h, w))


def _google_boxes(height: int, width: int, keys: Tensor, scale: float) -> Boxes:
    """The arithmetic of sample_distorted_bounding_box_op.cc in float32, for area (scale, 1) and ratio (0.75, 1.33)."""
    ratio, size, top, left = rng.uniform(keys, 4, 100).unbind(1)  # each (B, tries)
    ratio = 0.75 + (1.33 - 0.75) * ratio  # width / height
    least, most = torch.tensor(scale) * width * height, height * width
    low, high = (least / ratio).sqrt().round(), (most / ratio).sqrt().round()
    widest = ((width + 0.5) / ratio).floor()
    widest = torch.where((widest * ratio).round() > width, widest - 1, widest)
    high = torch.where((high * ratio).round() > width, widest, high).clamp(max=height)
    low = torch.minimum(low, high)
    h = low + (size * (high - low + 1)).floor()
    for edge in (1, -1):  # rounding may have left the allowed areas by a pixel
        area = h * (h * ratio).round()
        h = torch.where(area < least if edge == 1 else area > most, h + edge, h)
    w = (h * ratio).round()
    fits = (h * w >= least) & (h * w <= most) & (w > 0) & (w <= width) & (h > 0) & (h <= height)
    y, x = (top * (height - h)).floor(), (left * (width - w)).floor()  # the last place is never drawn
    y, x, h, w, found = _first(fits, y, x, h, w)
    return _otherwise(found, (y, x, h, w), (0, 0, height, width))


def _first(fits: Tensor, *values: Tensor) -> list[Tensor]:
    """Of each of `values` (B, tries) the first that fits, and whether any does: all (B,)."""
    first = fits.float().argmax(1, keepdim=True)
    return [*(value.gather(1, first)[:, 0] for value in values), fits.any(1)]


def _otherwise(found: Tensor, boxes: Boxes, box: tuple[int, int, int, int]) -> Boxes:
    y, x, h, w = (torch.where(found, a, b) for a, b in zip(boxes, box, strict=True))
    return y, x, h, w


def _weights(start: Tensor, length: Tensor, size: int, out: int, antialias: bool, flip: Tensor | None = None) -> Tensor:
    """Weights (B, out, size) that sample `length` pixels from `start` at `out` places: bilinear, half-pixel centres.

    With `antialias` the triangle is as wide as what it stands for, as in PIL and F.interpolate.
    """
    place = torch.arange(out, device=start.device).expand(len(start), out)
    if flip is not None:
        place = torch.where(flip[:, None], out - 1 - place, place)
    step = (length / out)[:, None]
    centre = (start[:, None] + (place + 0.5) * step - 0.5)[:, :, None]  # (B, out, 1)
    reach = step.clamp(min=1)[:, :, None] if antialias else 1
    pixel = torch.arange(size, device=start.device)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])  # (B, size)
    weights = (1 - (centre - pixel).abs() / reach).clamp(min=0) * inside[:, None]
    return weights / weights.sum(2, keepdim=True)


def random_resized_crop(
    images: Tensor,
    size: tuple[int, int],
    keys: Tensor,
    scale: float,
    flip: bool = False,
    sampler: str = "torchvision",
) -> Tensor:
    """A random part of each image, resized: (B, C, H, W) and keys (B,) -> (B, C, h, w) float32.

    Parts are those of `crop_boxes`; bilinear, antialiased under 'torchvision' and not under 'google', as they do. With
    `flip`, half of them are mirrored left to right. One image alone, a worker's photo, is cut out before it is resized:
    the host waits for its box.
    """
    height, width = images.shape[2:]
    antialias = sampler == "torchvision"
    y, x, h, w = crop_boxes(height, width, keys, scale, sampler)
    mirrored = rng.uniform(rng.fold_in(keys, 1)) < 0.5 if flip else None  # (B,)
    if len(images) == 1:
        top, left, bottom, right = (int(edge) for edge in (y, x, y + h, x + w))
        crop = _resize(images[:, :, top:bottom, left:right], size, "bilinear", antialias)
        return crop.flip(-1) if mirrored is not None and mirrored.item() else crop
    rows = _weights(y, h, height, size[0], antialias)  # (B, h, H)
    columns = _weights(x, w, width, size[1], antialias, mirrored)  # (B, w, W)
    narrow = (rows[:, None] @ images.float()).flatten(1, 2)  # (B, C h, W): one product an image, no copies of columns
    return (narrow @ columns.mT).unflatten(1, (-1, size[0]))


def _resize(images: Tensor, size: tuple[int, int], interpolation: str, antialias: bool) -> Tensor:
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)  # torch is slower with channels last
    return F.interpolate(pixels, size, mode=interpolation, align_corners=False, antialias=antialias)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, no antialiasing, aspect ratio ignored, as Google evaluates: (B, C, H, W) -> (B, C, h, w) float32."""
    if len(images) == 1:
        return _resize(images, size, "bilinear", antialias=False)
    zero = torch.zeros(1, device=images.device)
    rows = _weights(zero, zero + images.shape[2], images.shape[2], size[0], antialias=False)  # (1, h, H)
    columns = _weights(zero, zero + images.shape[3], images.shape[3], size[1], antialias=False)  # (1, w, W)
    return rows @ images.float() @ columns.mT


def resize_and_crop(
    images: Tensor,
    size: tuple[int, int],
    fraction: float,
    interpolation: str,
    keep_ratio: bool = True,
    down: bool = False,
) -> Tensor:
    """What published accuracies assume: (B, C, H, W) -> (B, C, h, w) float32, the centre of the resized image.

    It is resized, its ratio kept, to the least size that covers `size` / `fraction` rounded down (of square sizes: the
    shorter side becomes that), or without `keep_ratio` to that, antialiased; `interpolation` is bilinear or bicubic.
    The centre's place is rounded to even, as timm and torchvision do, or `down`, as transformers does.
    """
    height, width = images.shape[2:]
    h, w = (math.floor(side / fraction + 1e-6) for side in size)
    if not keep_ratio:
        pass
    elif h * width >= w * height:  # the height decides
        w = h * width // height
    else:
        h = w * height // width
    resized = _resize(images, (h, w), interpolation, antialias=True).clamp(0, 255)  # bicubic overshoots
    y, x = ((edge - side) // 2 if down else round((edge - side) / 2) for edge, side in zip((h, w), size, strict=True))
    return resized[:, :, y : y + size[0], x : x + size[1]]
