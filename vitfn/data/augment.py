"""Augmentation as a function of (images, labels, seed, step), batched, on the images' device.

B batch, C channels, H and W height and width before a crop, h and w after, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vitfn import rng
from vitfn.config import ViTConfig
from vitfn.data.crops import random_boxes, random_resized_crop
from vitfn.data.mix import cutmix, mixup
from vitfn.data.randaugment import randaugment
from vitfn.losses import one_hot


class Augmentation(NamedTuple):
    """What is done to training images; by default a random crop alone."""

    crop_min: float = 0.05  # least part of an image's area to keep; at 1 a square image is only resized
    crop: str = "torchvision"  # one of crops.SAMPLERS
    flip: bool = False  # mirror half of the images left to right
    randaugment: tuple[int, int] | None = None  # number of operations, magnitude 0 to 10
    erasing: float = 0.0  # probability
    mixup: float = 0.0  # alpha; 0 is off
    cutmix: float = 0.0  # alpha; 0 is off


def normalise(images: Tensor, config: ViTConfig, *, donate: bool = False) -> Tensor:
    """Pixels 0 to 255 to what the model expects, (x / 255 - mean) / std: (B, C, H, W) float32.

    With `donate` the memory of float32 images is reused: new memory costs the CPU more than the arithmetic.
    """

    def channels(value: float | tuple[float, ...]) -> Tensor:  # (1 or C, 1, 1), made where it is used
        values = value if isinstance(value, tuple) else (value,)
        return torch.stack([torch.full((1, 1), 255 * v, device=images.device) for v in values])

    pixels = images.float()
    centred = (pixels.sub_ if donate else pixels.sub)(channels(config.mean))
    return centred.div_(channels(config.std))


def sample_keys(seed: int, step: int, places: Tensor, use: str = "augment") -> Tensor:
    """A key for each place in the batch of a step: places (B,) int64 -> (B,) int64, on their device."""
    return rng.fold_in(rng.fold_in(rng.stream(seed, use), step), places)


def crop(images: Tensor, keys: Tensor, *, config_size: tuple[int, int], augmentation: Augmentation) -> Tensor:
    """A random part of each image, perhaps mirrored: (B, C, H, W) and keys (B,) -> (B, C, h, w) pixels, float32."""
    return random_resized_crop(images, config_size, keys, augmentation.crop_min, augmentation.flip, augmentation.crop)


def augment(
    images: Tensor,
    labels: Tensor,
    config: ViTConfig,
    *,
    seed: int,
    step: int,
    augmentation: Augmentation,
    places: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    """A step's cropped images, pixels (B, C, h, w) float32, and labels (B,) -> what the train step takes, normalised.

    RandAugment, normalisation, random erasing, then mixup or cutmix: a function of (seed, step) and each image's place
    in the batch, `places` (B,) int64, by default 0 to B - 1. Where both of the last are on, a step's toss decides.
    Labels stay as they are unless images are mixed, then they are targets (B, K) float32. With `donate` the images'
    memory is reused, and they are not to be used again. Raises InputError where an optional dependency is missing.
    """
    places = torch.arange(len(images)) if places is None else places
    if augmentation.randaugment:
        images = randaugment(images, sample_keys(seed, step, places, "randaugment"), *augmentation.randaugment)
    images = normalise(images, config, donate=donate)
    if augmentation.erasing:
        keys = sample_keys(seed, step, places.to(images.device), "erasing")
        images = random_erasing(images, keys, augmentation.erasing)
    mixing = [(f, alpha) for f, alpha in ((mixup, augmentation.mixup), (cutmix, augmentation.cutmix)) if alpha]
    if not mixing:
        return images, labels
    key = rng.fold_in(rng.stream(seed, "mix"), step)
    mix, alpha = mixing[rng.fold_in(key, 0) * len(mixing) >> 32]
    return mix(images, one_hot(labels, config.num_classes), alpha, key)


def random_erasing(images: Tensor, keys: Tensor, probability: float) -> Tensor:
    """A random rectangle of some normalised images set to 0, the mean (Zhong et al., arXiv 1708.04896).

    (B, C, H, W) and keys (B,); each image with `probability`. Area 0.02 to 1/3 of the image, uniform; ratio of the
    sides 0.3 to 3.3, log-uniform. Where none of ten tries fits, nothing is erased.
    """
    height, width = images.shape[2:]
    (y, x, h, w), found = random_boxes(height, width, keys, (0.02, 1 / 3), (0.3, 3.3))
    erased = found & (rng.uniform(rng.fold_in(keys, 1)) < probability)  # (B,)

    def inside(start: Tensor, length: Tensor, size: int) -> Tensor:  # (B, size)
        pixel = torch.arange(size, device=images.device)
        return (pixel >= start[:, None]) & (pixel < (start + length)[:, None])

    rows, columns = inside(y, h, height), inside(x, w, width)
    return images.masked_fill((erased[:, None, None] & rows[:, :, None] & columns[:, None, :])[:, None], 0)
