"""Crops and resizing against torch's, torchvision's, TensorFlow's and PIL's ways of doing it, reimplemented."""

import functools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vitfn import rng
from vitfn.data.crops import SAMPLERS, _weights, crop_boxes, random_resized_crop, resize, resize_and_crop

PIXEL = 5e-3  # what float32 positions may cost, of 255


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def interpolate(images: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    return F.interpolate(images.double(), size, mode="bilinear", align_corners=False, antialias=antialias).float()


def keys_of(count: int, seed: int = 0) -> Tensor:
    return rng.fold_in(rng.stream(seed, "test"), torch.arange(count))


# --- resize


SIZES = st.tuples(st.integers(1, 48), st.integers(1, 48))


@settings(max_examples=40)
@given(st.integers(1, 2), SIZES, SIZES)
def test_resize_is_torch_s_bilinear(count, before, after):
    images = pixels(count, 3, *before)
    torch.testing.assert_close(resize(images, after), interpolate(images, after), rtol=0, atol=PIXEL)


def test_resize_to_224_is_torch_s_bilinear():
    images = pixels(2, 3, 32, 32)
    torch.testing.assert_close(resize(images, (224, 224)), interpolate(images, (224, 224)), rtol=0, atol=PIXEL)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("hw", [(32, 32), (17, 224)])
def test_resize_to_the_same_size_changes_nothing(count, hw):
    images = pixels(count, 3, *hw)
    assert torch.equal(resize(images, hw), images.float())


# --- resize_and_crop


def photo(height: int, width: int) -> Tensor:
    """Structure at every scale, not so near to black and white that PIL clamps between its two passes."""
    rough = F.interpolate(pixels(1, 3, 7, 9).float(), (height, width), mode="bilinear", align_corners=False)
    return (rough + 0.3 * (pixels(1, 3, height, width, seed=1).float() - 128)).clamp(50, 205).round().byte()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("hw", "size", "fraction", "resized", "corner"),
    [
        ((120, 200), (56, 56), 0.875, (64, 106), (4, 25)),
        ((200, 120), (56, 56), 0.875, (106, 64), (25, 4)),
        ((100, 100), (64, 64), 1.0, (64, 64), (0, 0)),
        ((40, 50), (64, 64), 0.9, (71, 88), (4, 12)),  # enlarged; 71.1 and 88.75 are rounded down
        ((90, 200), (48, 64), 0.8, (60, 133), (6, 34)),  # the height decides
        ((200, 90), (48, 64), 0.8, (177, 80), (64, 8)),
    ],
)
def test_the_centre_of_the_resized_image_is_pil_s(interpolation, hw, size, fraction, resized, corner):
    image = photo(*hw)
    method = getattr(Image.Resampling, interpolation.upper())
    small = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize(resized[::-1], method)
    want = np.asarray(small)[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
    found = resize_and_crop(image, size, fraction, interpolation)
    assert (found.shape, found.dtype) == ((1, 3, *size), torch.float32)
    assert 0 <= float(found.min()) <= float(found.max()) <= 255
    assert np.abs(found[0].permute(1, 2, 0).numpy() - want).max() < 1.5  # PIL rounds twice


def test_what_bicubic_overshoots_is_cut_off():
    image = torch.zeros(1, 1, 16, 16)
    image[:, :, :, 8:] = 255
    smooth = F.interpolate(image, (64, 64), mode="bicubic", align_corners=False, antialias=True)
    assert float(smooth.min()) < -5
    assert float(smooth.max()) > 260
    torch.testing.assert_close(resize_and_crop(image, (64, 64), 1.0, "bicubic"), smooth.clamp(0, 255))


def test_a_batch_s_centres_are_its_images_s():
    images = torch.cat([photo(60, 90), photo(60, 90).flip(3)]).float()
    found = resize_and_crop(images, (32, 32), 0.875, "bicubic")
    torch.testing.assert_close(
        found, torch.cat([resize_and_crop(i, (32, 32), 0.875, "bicubic") for i in images[:, None]])
    )


# --- random_resized_crop


@settings(max_examples=60)
@given(st.data(), st.tuples(st.integers(1, 48), st.integers(2, 48)), st.booleans())
def test_a_given_box_is_cropped_and_resized_as_torch_does(data, size, antialias):
    """Pixels outside of the box have no part in it. (torch antialiases an output of one column wrongly.)"""
    height, width = 40, 30
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    y, x = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    images = pixels(1, 3, height, width)
    rows = _weights(torch.tensor([float(y)]), torch.tensor([float(h)]), height, size[0], antialias)
    columns = _weights(torch.tensor([float(x)]), torch.tensor([float(w)]), width, size[1], antialias)
    want = interpolate(images[:, :, y : y + h, x : x + w], size, antialias)
    torch.testing.assert_close(rows[:, None] @ images.float() @ columns[:, None].mT, want, rtol=0, atol=PIXEL)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(64, 64), (20, 33)])
def test_random_crops_are_resized_as_torch_does(size, channels, sampler):
    images, keys = pixels(1, channels, 48, 64), keys_of(30)
    many = images.expand(30, -1, -1, -1)
    crops = random_resized_crop(many, size, keys, 0.05, sampler=sampler)
    mirrored = random_resized_crop(many.float(), size, keys, 0.05, flip=True, sampler=sampler)
    flips = 0
    boxes = torch.stack(crop_boxes(48, 64, keys, 0.05, sampler), 1).int().tolist()
    for crop, mirror, (y, x, h, w) in zip(crops, mirrored, boxes, strict=True):
        want = interpolate(images[:, :, y : y + h, x : x + w], size, antialias=sampler == "torchvision")[0]
        torch.testing.assert_close(crop, want, rtol=0, atol=PIXEL)
        flipped = not torch.allclose(mirror, want, rtol=0, atol=PIXEL)
        torch.testing.assert_close(mirror, want.flip(-1) if flipped else want, rtol=0, atol=PIXEL)
        flips += flipped
    assert 0 < flips < 30


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_image_alone_is_cropped_as_in_a_batch(sampler):
    images, keys = pixels(16, 3, 45, 60), keys_of(16)
    whole = random_resized_crop(images, (24, 32), keys, 0.05, flip=True, sampler=sampler)
    alone = [
        random_resized_crop(image, (24, 32), key, 0.05, flip=True, sampler=sampler)
        for image, key in zip(images.split(1), keys.split(1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=PIXEL)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (224, 224)])
def test_crop_min_1_of_square_images_is_resize(size):
    images = pixels(20, 3, 32, 32)
    crops = random_resized_crop(images, size, keys_of(20), 1.0)
    torch.testing.assert_close(crops, resize(images, size), rtol=0, atol=PIXEL)


def test_crop_min_1_at_equal_size_changes_nothing():
    images = pixels(50, 3, 32, 32)
    assert torch.equal(random_resized_crop(images, (32, 32), keys_of(50), 1.0), images.float())


def test_mirroring_mirrors_about_half_exactly():
    images, count = pixels(2000, 1, 8, 8), 2000
    plain = random_resized_crop(images, (8, 8), keys_of(count), 1.0)
    flipped = random_resized_crop(images, (8, 8), keys_of(count), 1.0, flip=True)
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(int(mirrored.sum()) - count / 2) < 4 * math.sqrt(count / 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_batch_s_crops_are_the_products_of_its_weights_to_the_bit(channels, sampler):
    """In place of one product for each image and channel, with the same sums."""
    images, keys, size = pixels(7, channels, 32, 40), keys_of(7), (56, 72)
    y, x, h, w = crop_boxes(32, 40, keys, 0.05, sampler)
    rows = _weights(y, h, 32, size[0], sampler == "torchvision")
    columns = _weights(x, w, 40, size[1], sampler == "torchvision")
    want = rows[:, None] @ images.float() @ columns[:, None].mT
    assert torch.equal(random_resized_crop(images, size, keys, 0.05, sampler=sampler), want)


@pytest.mark.parametrize(
    "function", [resize, functools.partial(resize_and_crop, fraction=0.875, interpolation="bicubic")]
)
def test_how_a_file_s_pixels_lie_in_memory_changes_no_bit(function):
    """Pillow has (H, W, C); what torch gets of it is a view."""
    planes, keys = pixels(1, 3, 150, 200), keys_of(1)
    interleaved = planes.contiguous(memory_format=torch.channels_last)
    assert not interleaved.is_contiguous()
    assert torch.equal(function(interleaved, size=(56, 64)), function(planes, size=(56, 64)))
    for sampler in SAMPLERS:
        crops = [random_resized_crop(x, (56, 64), keys, 0.3, flip=True, sampler=sampler) for x in (planes, interleaved)]
        assert torch.equal(*crops)


# --- crop_boxes


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1), st.sampled_from(SAMPLERS))
def test_boxes_are_whole_pixels_within_the_image(height, width, scale, sampler):
    boxes = crop_boxes(height, width, keys_of(50), scale, sampler)
    y, x, h, w = boxes
    for value in boxes:
        assert value.shape == (50,)
        assert torch.equal(value, value.round())
    assert ((y >= 0) & (h >= 1) & (y + h <= height)).all()
    assert ((x >= 0) & (w >= 1) & (x + w <= width)).all()


@pytest.mark.parametrize(("hw", "box"), [((20, 100), (0, 36, 20, 27)), ((100, 20), (36, 0, 27, 20))])
def test_where_no_crop_fits_it_is_the_largest_centred_one(hw, box):
    """The whole area does not fit in any ratio from 3/4 to 4/3."""
    for value, want in zip(crop_boxes(*hw, keys_of(20), 1.0), box, strict=True):
        assert (value == want).all()


def test_where_no_crop_fits_google_keeps_the_whole_image():
    for value, want in zip(crop_boxes(20, 100, keys_of(20), 0.9, "google"), (0, 0, 20, 100), strict=True):
        assert (value == want).all()


def szegedy(height: int, width: int, scale: float, source: random.Random) -> tuple[int, int, int, int]:
    """y, x, h, w by torchvision's RandomResizedCrop.get_params."""
    for _ in range(10):
        area = height * width * source.uniform(scale, 1)
        ratio = math.exp(source.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return source.randint(0, height - h), source.randint(0, width - w), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def google(height: int, width: int, scale: float, draws: Callable[[], float]) -> tuple[int, int, int, int]:
    """y, x, h, w by TensorFlow's sample_distorted_bounding_box (area scale to 1, ratio 0.75 to 1.33, 100 attempts)."""
    least, most = scale * height * width, height * width
    for _ in range(100):
        ratio = 0.75 + draws() * (1.33 - 0.75)
        size, top, left = draws(), draws(), draws()
        h, highest = round(math.sqrt(least / ratio)), round(math.sqrt(most / ratio))
        if round(highest * ratio) > width:
            highest = int((width + 0.5 - 1e-7) / ratio)
            if round(highest * ratio) > width:
                highest -= 1
        highest = min(highest, height)
        h = min(h, highest)
        if h < highest:
            h += int(size * (highest - h + 1))
        w = round(h * ratio)
        if w * h < least:
            h += 1
            w = round(h * ratio)
        if w * h > most:
            h -= 1
            w = round(h * ratio)
        if w * h < least or w * h > most or w > width or h > height or w <= 0 or h <= 0:
            continue
        y = int(top * (height - h)) if h < height else 0
        x = int(left * (width - w)) if w < width else 0
        return y, x, h, w
    return 0, 0, height, width


@pytest.mark.parametrize("hw", [(40, 40), (36, 72), (224, 160)])
@pytest.mark.parametrize("scale", [0.05, 0.5, 0.7])
def test_google_s_boxes_are_tensorflow_s_for_the_same_draws(hw, scale):
    """In float64, so that one in a thousand may be rounded otherwise."""
    keys = keys_of(1000)
    found = torch.stack(crop_boxes(*hw, keys, scale, "google"), 1).int().tolist()
    wrong = 0
    for box, draws in zip(found, rng.uniform(keys, 4, 100).mT.flatten(1), strict=True):
        values = iter(draws.tolist())
        wrong += tuple(box) != google(*hw, scale, lambda values=values: next(values))
    assert wrong <= 2


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of two empirical distributions."""
    places = np.concatenate([a, b])
    below_a, below_b = (np.searchsorted(np.sort(v), places, side="right") / len(v) for v in (a, b))
    return float(np.abs(below_a - below_b).max())


@pytest.mark.parametrize("hw", [(40, 40), (36, 72)])
@pytest.mark.parametrize("scale", [0.05, 0.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_crops_are_distributed_as_those_of_the_original(hw, scale, sampler):
    count = 10_000
    found = torch.stack(crop_boxes(*hw, keys_of(count), scale, sampler)).double().numpy()
    source = random.Random(1)
    original = (
        (lambda: szegedy(*hw, scale, source))
        if sampler == "torchvision"
        else (lambda: google(*hw, scale, source.random))
    )
    want = np.array([original() for _ in range(count)]).T
    limit = 1.95 * math.sqrt(2 / count)  # exceeded by chance once in a thousand
    for a, b in zip(found, want, strict=True):  # y, x, h, w
        assert distance(a, b) < limit
    assert distance(found[2] * found[3], want[2] * want[3]) < limit
    assert distance(found[3] / found[2], want[3] / want[2]) < limit


def test_the_samplers_differ_as_their_originals_do():
    """The one has a uniform area, the other a uniform height; and Google's never reaches the last row and column."""
    area = {
        s: float((h * w).mean()) / 3600 for s in SAMPLERS for _, _, h, w in [crop_boxes(60, 60, keys_of(5000), 0.05, s)]
    }
    assert area["google"] < area["torchvision"] - 0.03
    y, x, h, w = crop_boxes(60, 60, keys_of(5000), 0.05, "google")
    assert not ((y + h == 60) & (h < 60)).any()
    assert not ((x + w == 60) & (w < 60)).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_area_ratio_place_and_mirror_are_independent(sampler):
    """Every crop of less than 3/4 of the area fits, so that none of these is chosen by its shape."""
    keys = keys_of(10_000)
    y, x, h, w = (v.double().numpy() for v in crop_boxes(60, 60, keys, 0.05, sampler))
    coordinates = torch.arange(60.0).expand(len(keys), 1, 60, 60)
    ends = random_resized_crop(coordinates, (1, 2), keys, 0.05, flip=True, sampler=sampler)[:, 0, 0]
    mirrored = (ends[:, 0] > ends[:, 1]).double().numpy()
    fits = w * h < 0.72 * 60 * 60
    y, x, h, w, mirrored = (v[fits] for v in (y, x, h, w, mirrored))
    size = w * h if sampler == "torchvision" else np.sqrt(w * h)
    room = 61 if sampler == "torchvision" else 60
    values = np.stack([size, np.log(w / h), (x + 0.5) / (room - w), (y + 0.5) / (room - h), mirrored])
    correlations = np.abs(np.corrcoef(values) - np.eye(5))
    if sampler == "google":
        correlations[0, 1] = correlations[1, 0] = 0  # a height's range depends on the ratio
    assert correlations.max() < 4 / math.sqrt(fits.sum())
