"""Normalising, random erasing and the whole of augmentation against closed forms; what makes up a batch."""

import math
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SMALL
from scipy import stats
from torch import Tensor

import vitfn
from vitfn import rng
from vitfn.data.augment import Augmentation, augment, crop, normalise, random_erasing, sample_keys
from vitfn.data.crops import random_resized_crop
from vitfn.data.mix import cutmix, mixup
from vitfn.losses import one_hot

EVERYTHING = Augmentation(randaugment=(2, 9), erasing=0.5, mixup=0.2, cutmix=1.0)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def keys_of(count: int, seed: int = 0) -> Tensor:
    return rng.fold_in(rng.stream(seed, "test"), torch.arange(count))


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


@pytest.mark.parametrize("donate", [False, True])
def test_only_donated_images_are_written_over(donate):
    """To the same numbers; uint8 images have no memory to give."""
    x = pixels(2, 3, 8, 8)
    floats, memory = x.float(), x.clone()
    y = augment(floats, torch.arange(2), SMALL, seed=0, step=0, augmentation=Augmentation(), donate=donate)[0]
    assert torch.equal(y, normalise(x, SMALL))
    assert torch.equal(y, floats) == donate
    assert torch.equal(normalise(memory, SMALL, donate=donate), y)
    assert torch.equal(memory, x)


# --- crop


def test_crop_is_a_random_resized_crop_of_the_model_s_size():
    images, keys = pixels(6, 3, 32, 32), keys_of(6)
    given = Augmentation(crop_min=0.3, crop="google", flip=True)
    y = crop(images, keys, config_size=(24, 40), augmentation=given)
    assert torch.equal(y, random_resized_crop(images, (24, 40), keys, 0.3, True, "google"))
    assert (y.shape, y.dtype) == ((6, 3, 24, 40), torch.float32)


def test_crop_travels_to_worker_processes():
    ready = partial(crop, config_size=(16, 16), augmentation=Augmentation(flip=True))
    images, keys = pixels(3, 3, 32, 32), keys_of(3)
    assert torch.equal(pickle.loads(pickle.dumps(ready))(images, keys), ready(images, keys))


def test_an_image_s_crop_does_not_depend_on_the_others():
    images, keys = pixels(8, 3, 32, 32), sample_keys(1, 2, torch.arange(8))
    ready = partial(crop, config_size=(16, 16), augmentation=Augmentation(flip=True))
    whole = ready(images, keys)
    torch.testing.assert_close(ready(images[:3], keys[:3]), whole[:3], rtol=0, atol=5e-3)
    others = pixels(8, 3, 32, 32, seed=1)
    others[5] = images[5]
    torch.testing.assert_close(ready(others, keys)[5], whole[5], rtol=0, atol=5e-3)


def test_seeds_steps_places_and_uses_have_keys_of_their_own():
    keys = torch.cat(
        [sample_keys(s, t, torch.arange(50), use) for s in range(5) for t in range(5) for use in ("augment", "erasing")]
    )
    assert len(keys.unique()) == 5 * 5 * 2 * 50
    assert torch.equal(sample_keys(1, 2, torch.tensor([7])), sample_keys(1, 2, torch.arange(50))[7:8])


# --- random_erasing


def erased(count: int, probability: float = 1.0) -> Tensor:
    """Which pixels, (B, H, W)."""
    return random_erasing(torch.ones(count, 2, 32, 40), keys_of(count), probability)[:, 0] == 0


def test_what_is_erased_is_one_rectangle_of_zeros_in_every_channel():
    images = torch.randn(200, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    y, where = random_erasing(images, keys_of(200), 1.0), erased(200)
    assert torch.equal(y, torch.where(where[:, None], 0, images))
    rows, columns = where.any(2), where.any(1)
    assert torch.equal(where, rows[:, :, None] & columns[:, None])
    for side in (rows, columns):
        assert (changes(side) <= 2).all()  # connected


def changes(side: Tensor) -> Tensor:
    return (side[:, 1:] != side[:, :-1]).sum(1)


def zhong(height: int, width: int, source: random.Random) -> tuple[int, int, int, int]:
    """y, x, h, w by the usual algorithm; ten tries nearly always suffice."""
    while True:
        area = source.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(source.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return source.randint(0, height - h), source.randint(0, width - w), h, w


def test_rectangles_are_distributed_as_the_paper_s():
    where, source = erased(3000), random.Random(0)
    rows, columns = where.any(2), where.any(1)
    found = [rows.int().argmax(1), columns.int().argmax(1), rows.sum(1), columns.sum(1), where.sum((1, 2))]
    want = [(*box, box[2] * box[3]) for box in (zhong(32, 40, source) for _ in range(3000))]
    for a, b in zip(found, np.array(want).T, strict=True):
        assert stats.ks_2samp(a.numpy(), b).pvalue > 1e-3


def test_images_are_erased_with_the_probability_given():
    some, every = erased(4000, 0.25), erased(4000)
    chosen = some.flatten(1).any(1)
    assert abs(int(chosen.sum()) - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75)
    assert torch.equal(some[chosen], every[chosen])  # whether and where are independent


def test_where_no_rectangle_fits_nothing_is_erased():
    images = torch.ones(50, 1, 1, 1000)
    torch.testing.assert_close(random_erasing(images, keys_of(50), 1.0), images)


# --- augment


def augmented(
    images: Tensor, given: Augmentation = EVERYTHING, *, seed: int = 1, step: int = 2
) -> tuple[Tensor, Tensor]:
    labels = torch.arange(len(images)) % SMALL.num_classes
    return augment(images, labels, SMALL, seed=seed, step=step, augmentation=given)


def test_by_default_augment_normalises_and_leaves_labels_alone():
    images = pixels(6, 3, 24, 40).float()
    y, labels = augmented(images, Augmentation())
    assert torch.equal(y, normalise(images, SMALL))
    assert torch.equal(labels, torch.arange(6))


def test_augment_is_a_function_of_seed_and_step():
    pytest.importorskip("kornia")
    images = pixels(8, 3, 32, 32).float()
    before, state = images.clone(), torch.get_rng_state()
    first = augmented(images)
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator was not touched
    assert torch.equal(images, before)
    assert [v.dtype for v in first] == [torch.float32, torch.float32]
    assert [tuple(v.shape) for v in first] == [(8, 3, 32, 32), (8, SMALL.num_classes)]
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(augmented(images), first, strict=True))
    for other in (augmented(images, seed=3), augmented(images, step=3)):
        assert not torch.equal(other[0], first[0])
        assert not torch.equal(other[1], first[1])


@pytest.mark.parametrize("given", [Augmentation(randaugment=(2, 9)), Augmentation(erasing=0.5)])
def test_without_mixing_an_image_does_not_depend_on_the_others(given):
    pytest.importorskip("kornia")
    images = pixels(16, 3, 32, 32).float()
    whole, _ = augmented(images, given)
    torch.testing.assert_close(augmented(images[:3], given)[0], whole[:3], rtol=0, atol=1e-4)
    assert not torch.equal(whole, normalise(images, SMALL))


@pytest.mark.parametrize("given", [EVERYTHING, Augmentation(cutmix=1.0, erasing=0.5)])
def test_a_share_with_the_image_before_it_is_augmented_as_the_whole_is(given):
    """So that several processes can each mix their own share: the partner of an image is the one before it."""
    pytest.importorskip("kornia")
    images, labels = pixels(8, 3, 32, 32).float(), torch.arange(8)
    options = {"seed": 1, "step": 2, "augmentation": given}
    whole = augment(images, labels, SMALL, **options)
    for start, stop in ((0, 4), (4, 8)):
        places = torch.tensor([(start - 1) % 8, *range(start, stop)])
        share = augment(images[places], labels[places], SMALL, **options, places=places)
        for x, y in zip(share, whole, strict=True):
            torch.testing.assert_close(x[1:], y[start:stop], rtol=0, atol=1e-4)


def test_equal_images_of_a_batch_are_augmented_differently():
    y, _ = augmented(pixels(1, 3, 32, 32).float().expand(16, -1, -1, -1), Augmentation(erasing=1.0))
    assert len(y.flatten(1).unique(dim=0)) == 16


@pytest.mark.parametrize(("mix", "given"), [(mixup, Augmentation(mixup=0.4)), (cutmix, Augmentation(cutmix=1.0))])
def test_mixing_comes_last_under_a_key_of_the_step(mix, given):
    images, labels = pixels(5, 3, 16, 16).float(), torch.arange(5)
    y, targets = augmented(images, given)
    alpha = given.mixup or given.cutmix
    want = mix(normalise(images, SMALL), one_hot(labels, 10), alpha, rng.fold_in(rng.stream(1, "mix"), 2))
    assert torch.equal(y, want[0])
    assert torch.equal(targets, want[1])


def test_where_both_mixes_are_on_each_has_half_of_the_steps():
    """In cutmix alone each pixel is somebody's own."""
    images = torch.tensor([0.0, 255.0])[:, None, None, None].expand(2, 3, 8, 8)
    given = Augmentation(mixup=1.0, cutmix=1.0)
    cuts = sum(bool((augmented(images, given, step=step)[0].abs() == 1).all()) for step in range(1000))
    assert abs(cuts - 500) < 4 * math.sqrt(250)


def test_given_probabilities_are_mixed_as_labels_are():
    images, labels = pixels(4, 3, 8, 8).float(), torch.arange(4)
    options = {"seed": 0, "step": 0, "augmentation": Augmentation(mixup=1.0)}
    as_labels = augment(images, labels, SMALL, **options)
    as_targets = augment(images, one_hot(labels, 10), SMALL, **options)
    assert all(torch.equal(a, b) for a, b in zip(as_labels, as_targets, strict=True))
