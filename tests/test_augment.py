"""Resizing, cropping, mirroring and normalising against independent references; what makes up a batch."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vitfn
from vitfn import rng
from vitfn.data import Split
from vitfn.data.augment import _interpolation, augment, normalise, random_resized_crop, resize
from vitfn.data.batches import batch_indices, padded_batches

PIXEL = 5e-3  # what float32 positions may cost, of 255


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def interpolate(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images.double(), size, mode="bilinear", align_corners=False, antialias=False).float()


def keys_of(count: int, seed: int = 0) -> Tensor:
    return rng.fold_in(rng.stream(seed, "test"), torch.arange(count))


def boxes(count: int, hw: tuple[int, int], scale: float, flip: bool = False) -> tuple[np.ndarray, ...]:
    """x, y, w, h and whether mirrored, of the crops under `keys_of(count)`.

    Read off an image whose pixels are their own coordinates: two samples lie at a quarter and three quarters.
    """
    y, x = torch.meshgrid(torch.arange(hw[0]), torch.arange(hw[1]), indexing="ij")
    coordinates = torch.stack([x, y]).float()
    sampled = torch.cat(
        [
            random_resized_crop(coordinates.expand(len(keys), -1, -1, -1), (2, 2), keys, scale, flip)
            for keys in keys_of(count).split(1000)
        ]
    ).double()
    left, right = sampled[:, 0, 0].unbind(1)
    top, bottom = sampled[:, 1, :, 0].unbind(1)
    w, h = 2 * (right - left).abs(), 2 * (bottom - top)
    values = (torch.minimum(left, right) - w / 4 + 0.5, top - h / 4 + 0.5, w, h)
    for value in values:
        torch.testing.assert_close(value, value.round(), rtol=0, atol=1e-3)  # whole pixels
    return (*(value.round().int().numpy() for value in values), (right < left).numpy())


# --- normalise


def test_google_s_normalisation_is_exact():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    y = normalise(x, SMALL).numpy()
    np.testing.assert_array_equal(y, (x.numpy().astype(np.float32) - np.float32(127.5)) / np.float32(127.5))
    assert (y.min(), y.max(), y.dtype) == (-1, 1, np.float32)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (0, 1), ((0.5, 0, 0.5), (0.5, 1, 0.5))],
    ids=["ImageNet's", "0 to 1", "mixed"],
)
def test_normalisation_by_channel(mean, std):
    config = vitfn.get_config("Ti/16", mean=mean, std=std)
    x = pixels(2, 3, 8, 8)
    want = (x.numpy() / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    y = normalise(x, config)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), want, rtol=0, atol=1e-6)


# --- resize


SIZES = st.tuples(st.integers(1, 48), st.integers(1, 48))


@settings(deadline=None, max_examples=40)
@given(before=SIZES, after=SIZES)
def test_resize_is_torch_s_bilinear(before, after):
    images = pixels(2, 3, *before)
    torch.testing.assert_close(resize(images, after), interpolate(images, after), rtol=0, atol=PIXEL)


def test_resize_to_224_is_torch_s_bilinear():
    images = pixels(2, 3, 32, 32)
    torch.testing.assert_close(resize(images, (224, 224)), interpolate(images, (224, 224)), rtol=0, atol=PIXEL)


@pytest.mark.parametrize("hw", [(32, 32), (17, 224)])
def test_resize_to_the_same_size_changes_nothing(hw):
    images = pixels(2, 3, *hw)
    assert torch.equal(resize(images, hw), images.float())


# --- random_resized_crop


@settings(deadline=None, max_examples=60)
@given(st.data(), SIZES)
def test_a_given_box_is_cropped_and_resized_as_torch_does(data, size):
    """Pixels outside of the box have no part in it."""
    height, width = 40, 30
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    y, x = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    images = pixels(1, 3, height, width)
    rows = _interpolation(torch.tensor([float(y)]), torch.tensor([float(h)]), height, size[0])
    columns = _interpolation(torch.tensor([float(x)]), torch.tensor([float(w)]), width, size[1])
    want = interpolate(images[:, :, y : y + h, x : x + w], size)
    torch.testing.assert_close(rows[:, None] @ images.float() @ columns[:, None].mT, want, rtol=0, atol=PIXEL)


@pytest.mark.parametrize("size", [(64, 64), (20, 33)])
def test_random_crops_are_resized_as_torch_does(size):
    images, count = pixels(1, 3, 48, 64), 30
    crops = random_resized_crop(images.expand(count, -1, -1, -1), size, keys_of(count), 0.05, flip=True)
    for crop, x, y, w, h, mirrored in zip(crops, *boxes(count, (48, 64), 0.05, flip=True), strict=True):
        want = interpolate(images[:, :, y : y + h, x : x + w], size)[0]
        torch.testing.assert_close(crop, want.flip(-1) if mirrored else want, rtol=0, atol=PIXEL)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (224, 224)])
def test_crop_min_1_of_square_images_is_resize(size):
    images = pixels(20, 3, 32, 32)
    torch.testing.assert_close(
        random_resized_crop(images, size, keys_of(20), 1.0), resize(images, size), rtol=0, atol=PIXEL
    )


def test_crop_min_1_at_equal_size_changes_nothing():
    images = pixels(50, 3, 32, 32)
    assert torch.equal(random_resized_crop(images, (32, 32), keys_of(50), 1.0), images.float())


@pytest.mark.parametrize(("hw", "box"), [((20, 100), (36, 0, 27, 20)), ((100, 20), (0, 36, 20, 27))])
def test_where_no_crop_fits_it_is_the_largest_centred_one(hw, box):
    """The whole area does not fit in any ratio from 3/4 to 4/3."""
    for value, want in zip(boxes(20, hw, 1.0), box, strict=False):
        assert (value == want).all()


def szegedy(height: int, width: int, scale: float, source: random.Random) -> tuple[int, int, int, int]:
    """x, y, w, h by torchvision's RandomResizedCrop.get_params."""
    for _ in range(10):
        area = height * width * source.uniform(scale, 1)
        ratio = math.exp(source.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return source.randint(0, width - w), source.randint(0, height - h), w, h
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of two empirical distributions."""
    places = np.concatenate([a, b])
    below_a, below_b = (np.searchsorted(np.sort(v), places, side="right") / len(v) for v in (a, b))
    return float(np.abs(below_a - below_b).max())


@pytest.mark.parametrize("hw", [(40, 40), (36, 72)])
@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_crops_are_distributed_as_torchvision_s(hw, scale):
    count = 10_000
    found = boxes(count, hw, scale)[:4]
    source = random.Random(1)
    want = np.array([szegedy(*hw, scale, source) for _ in range(count)]).T
    limit = 1.95 * math.sqrt(2 / count)  # exceeded by chance once in a thousand
    for a, b in zip(found, want, strict=True):  # x, y, w, h
        assert distance(a, b) < limit
    assert distance(found[2] * found[3], want[2] * want[3]) < limit
    assert distance(found[2] / found[3], want[2] / want[3]) < limit


def test_area_ratio_place_and_mirror_are_independent():
    """Every crop of less than 3/4 of the area fits, so that none of these is chosen by its shape."""
    count = 10_000
    x, y, w, h, mirrored = (v.astype(float) for v in boxes(count, (60, 60), 0.05, flip=True))
    fits = w * h < 0.72 * 60 * 60
    values = np.stack([w * h, np.log(w / h), (x + 0.5) / (61 - w), (y + 0.5) / (61 - h), mirrored])[:, fits]
    correlations = np.corrcoef(values) - np.eye(5)
    assert np.abs(correlations).max() < 4 / math.sqrt(fits.sum())


def test_mirroring_mirrors_about_half_exactly():
    images, count = pixels(2000, 1, 8, 8), 2000
    plain = random_resized_crop(images, (8, 8), keys_of(count), 1.0)
    flipped = random_resized_crop(images, (8, 8), keys_of(count), 1.0, flip=True)
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(int(mirrored.sum()) - count / 2) < 4 * math.sqrt(count / 4)


def test_mirroring_leaves_the_crop_where_it_was():
    plain, flipped = boxes(500, (48, 48), 0.05), boxes(500, (48, 48), 0.05, flip=True)
    for a, b in zip(plain[:4], flipped[:4], strict=True):
        np.testing.assert_array_equal(a, b)
    assert not plain[4].any()


# --- augment


def augmented(images: Tensor, *, seed: int = 1, step: int = 2) -> Tensor:
    return augment(images, SMALL, seed=seed, step=step, crop_min=0.05, flip=True)


def test_augment_gives_normalised_images_of_the_model_s_size():
    config = dataclasses.replace(SMALL, image_size=(24, 40))
    y = augment(pixels(6, 3, 32, 32), config, seed=0, step=0, crop_min=0.3, flip=True)
    assert (y.shape, y.dtype) == ((6, 3, 24, 40), torch.float32)
    assert -1 <= float(y.min()) < -0.8
    assert 0.8 < float(y.max()) <= 1


def test_augment_is_a_function_of_seed_and_step():
    images = pixels(8, 3, 32, 32)
    torch.manual_seed(0)
    first, state = augmented(images), torch.get_rng_state()
    torch.rand(5)
    assert torch.equal(augmented(images), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator was not touched
    for other in (augmented(images, seed=3), augmented(images, step=3)):
        assert not (other == first).flatten(1).all(1).any()


def test_equal_images_of_a_batch_are_augmented_differently():
    y = augmented(pixels(1, 3, 32, 32).expand(16, -1, -1, -1))
    assert len(y.flatten(1).unique(dim=0)) == 16


def test_an_image_s_crop_does_not_depend_on_the_others():
    images = pixels(8, 3, 32, 32)
    whole = augmented(images)
    torch.testing.assert_close(augmented(images[:3]), whole[:3], rtol=0, atol=1e-5)
    others = pixels(8, 3, 32, 32, seed=1)
    others[5] = images[5]
    torch.testing.assert_close(augmented(others)[5], whole[5], rtol=0, atol=1e-5)


# --- batches


@settings(deadline=None)
@given(st.data(), st.integers(1, 60), st.integers(0, 2**63 - 1))
def test_every_epoch_has_each_image_once(data, length, seed):
    """Batches of any size up to the whole set, laid end to end: each `length` of them is a permutation."""
    size = data.draw(st.integers(1, length))
    steps = -(-3 * length // size)
    order = torch.cat([batch_indices(length, size, seed, step) for step in range(steps)])
    assert len(order) == steps * size
    for epoch in order[: 3 * length].split(length):
        assert sorted(epoch.tolist()) == list(range(length))


def test_batches_run_across_the_end_of_an_epoch():
    order = torch.cat([batch_indices(10, 10, 0, epoch) for epoch in range(2)])
    assert torch.equal(batch_indices(10, 4, 0, 2), order[8:12])


def test_a_batch_is_a_function_of_seed_and_step():
    """Whatever was asked for before it."""
    steps = list(range(12))
    forward = [batch_indices(50, 16, 5, step).tolist() for step in steps]
    backward = [batch_indices(50, 16, 5, step).tolist() for step in reversed(steps)]
    assert forward == backward[::-1]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {tuple(batch_indices(50, 50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(50)) not in orders


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 40))
def test_padded_batches_have_every_image_once_in_one_shape(length, size):
    split = Split(
        torch.arange(1, length + 1).to(torch.uint8).reshape(-1, 1, 1, 1).repeat(1, 3, 2, 2), torch.arange(length)
    )
    batches = list(padded_batches(split, size))
    assert len(batches) == -(-length // size)
    assert {batch.images.shape for batch in batches} == {(size, 3, 2, 2)}
    assert {batch.labels.shape for batch in batches} == {(size,)}
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(images[:length], split.images)
    assert torch.equal(labels[:length], split.labels)
    assert (labels[length:] == -1).all()
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
