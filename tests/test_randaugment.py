"""RandAugment's operations against PIL's, and which image gets which."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vitfn import rng
from vitfn.data.randaugment import OPERATIONS, apply_operation, randaugment
from vitfn.errors import InputError

pytest.importorskip("kornia")

H, W = 40, 48


def smooth(count: int = 1, channels: int = 3) -> Tensor:
    """Whole levels from 20 to 220, (B, C, 40, 48)."""
    rough = torch.rand(count, channels, 5, 6, generator=torch.Generator().manual_seed(0))
    return (20 + 200 * F.interpolate(rough, (H, W), mode="bilinear", align_corners=False)).round()


def keys_of(count: int, seed: int = 0) -> Tensor:
    return rng.fold_in(rng.stream(seed, "test"), torch.arange(count))


def affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Pixel (x, y) from (ax + by + c, dx + ey + f); PIL counts from the pixels' corners, half a pixel off."""
    data = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    grey = (128,) * len(image.getbands())
    return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=grey)


def pil(name: str, image: Image.Image, strength: float) -> Image.Image:
    grey = (128,) * len(image.getbands())
    return {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
        "solarize": lambda: ImageOps.solarize(image, round(256 * (1 - abs(strength)))),
        "color": lambda: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength),
        "rotate": lambda: image.rotate(-30 * strength, Image.Resampling.BILINEAR, fillcolor=grey),
        "shear_x": lambda: affine(image, 1, -0.3 * strength, 0, 0, 1, 0),
        "shear_y": lambda: affine(image, 1, 0, 0, -0.3 * strength, 1, 0),
        "translate_x": lambda: affine(image, 1, 0, -0.45 * W * strength, 0, 1, 0),
        "translate_y": lambda: affine(image, 1, 0, 0, 0, 1, -0.45 * H * strength),
    }[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.5, -1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pil_s(name, strength, channels):
    x = smooth(2, channels)
    found = 255 * apply_operation(name, x / 255, torch.tensor([strength, -strength]))
    for i, signed in enumerate((strength, -strength)):
        image = Image.fromarray(x[i].byte().permute(1, 2, 0).squeeze(-1).numpy())
        want = torch.from_numpy(np.array(pil(name, image, signed))).reshape(H, W, channels).permute(2, 0, 1).float()
        error = (found[i] - want).abs()
        # Where an image ends PIL's edges are hard, ours blend into the grey.
        allowed = 0.08 if name.startswith(("rotate", "shear", "translate")) else 0
        assert float((error > 2).float().mean()) <= allowed
        if (
            name not in ("identity", "sharpness")
            and (name, channels) != ("color", 1)
            and (name, strength) != ("posterize", 0)
        ):
            assert float((want - x[i]).abs().mean()) > 1  # there was something to be wrong about


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize")])
def test_no_strength_is_no_change(name):
    x = smooth(2) / 255
    torch.testing.assert_close(apply_operation(name, x, torch.zeros(2)), x, rtol=0, atol=2e-5)


def test_what_has_no_contrast_stays_as_it_is():
    x = torch.full((1, 3, 8, 8), 100 / 255)
    for name in ("autocontrast", "equalize", "contrast"):
        torch.testing.assert_close(apply_operation(name, x, torch.ones(1)), x)


def test_each_image_gets_its_own_operations_in_order():
    """Redone one image and one operation at a time."""
    x, keys = smooth(30), keys_of(30)
    found = randaugment(x, keys, 3, 7)
    for i in range(30):
        choice, sign = rng.uniform(keys[i], 2, 3)
        want = x[i : i + 1]
        for c, s in zip(choice.tolist(), sign.tolist(), strict=True):
            strength = torch.tensor([0.7 if s >= 0.5 else -0.7])
            want = 255 * apply_operation(OPERATIONS[int(14 * c)], want.round() / 255, strength)
        torch.testing.assert_close(found[i : i + 1], want, rtol=0, atol=1e-2)


def test_every_operation_is_chosen_as_often():
    x = smooth(1)[:, :, ::2, ::2].expand(2800, -1, -1, -1)
    unchanged = (randaugment(x, keys_of(2800), 1, 10) == x).flatten(1).all(1)
    assert abs(int(unchanged.sum()) - 200) < 4 * np.sqrt(200)
    choice = (rng.uniform(keys_of(2800), 2, 1)[:, 0, 0] * len(OPERATIONS)).long().bincount(minlength=len(OPERATIONS))
    assert float(((choice - 200) ** 2 / 200).sum()) < 34.5  # chi-square, 13 degrees, once in a thousand


def test_an_image_does_not_depend_on_the_others():
    x, keys = smooth(30), keys_of(30)
    whole = randaugment(x, keys, 2, 10)
    for i in range(0, 30, 7):
        torch.testing.assert_close(randaugment(x[i : i + 1], keys[i : i + 1], 2, 10)[0], whole[i], rtol=0, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_keep_their_shape_and_range_and_the_given_ones_their_pixels(channels):
    x = smooth(80, channels)
    before, state = x.clone(), torch.get_rng_state()
    y = randaugment(x, keys_of(80), 2, 10)
    assert (y.shape, y.dtype) == (x.shape, torch.float32)
    assert -1e-3 < float(y.min()) < float(y.max()) < 255.001
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_kornia_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "kornia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(InputError, match=r"--randaugment.*pip install kornia"):
        randaugment(smooth(40), keys_of(40), 1, 5)
