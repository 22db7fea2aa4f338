"""One image file as a tensor: whatever Pillow reads safely, and .npy for other numbers of channels."""

import warnings
from typing import NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitfn.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy")

# Whatever the file's name: Pillow would run Ghostscript on EPS, and its JPEG 2000 takes a torn file for a whole one.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION = 0x0112  # EXIF's tag, and what turns each of its values upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _UnfitError(Exception):
    """A whole file whose pixels are not what is needed."""


def decode(path: str, channels: int) -> Tensor:
    """The pixels of a file, turned upright by its EXIF tag: (C, H, W) uint8, a view of (H, W, C) as Pillow has them.

    1 channel is grey, 3 RGB, 4 RGBA; alpha is dropped, not blended, for 1 and 3, and of an animation the first frame
    is taken. A .npy file holds (H, W, C) uint8 for any C. Raises InputError for files that are missing, torn or
    foreign, and for images of more pixels than twice PIL.Image.MAX_IMAGE_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and the like: what counts is whether the pixels are there
            pixels = _array(path, channels) if path.lower().endswith(".npy") else _picture(path, channels)
    except FileNotFoundError:
        _refuse(path, "no such file", channels)
    except Image.UnidentifiedImageError:
        _refuse(path, f"none of {', '.join(_FORMATS)}", channels)
    except _UnfitError as error:
        _refuse(path, str(error), channels)
    except Exception as error:  # a foreign file fails in any way it likes
        _refuse(path, f"a damaged file ({type(error).__name__}: {error})", channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # what is cropped is put in order with the crop, not the whole


def _refuse(path: str, found: str, channels: int) -> NoReturn:
    kind = "an image" if channels in _MODES else f"an image of {channels} channels, a .npy file of (H, W, {channels})"
    raise InputError(f"{path}: found {found[:300]}, expected {kind}") from None


def _array(path: str, channels: int) -> np.ndarray:  # (H, W, C), in memory of its own
    # A map: a header may promise more than the file holds, which np.load would allocate. Nothing is unpickled.
    pixels = np.lib.format.open_memmap(path, mode="r")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
        raise _UnfitError(f"{pixels.dtype} of shape {pixels.shape}, not uint8 of (H, W, {channels})")
    return np.array(pixels, order="C")


def _picture(path: str, channels: int) -> np.ndarray:  # (H, W, C), in memory of its own
    with Image.open(path, formats=_FORMATS) as file:
        if channels not in _MODES:
            raise _UnfitError(f"a {file.format} file")
        file.load()
        image = _eight_bits(_upright(file))
        if image.mode != _MODES[channels]:  # else convert() would copy it
            image = image.convert(_MODES[channels])
        return np.array(image).reshape(image.height, image.width, channels)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # an EXIF block that cannot be read turns nothing; the pixels are whole
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, scaled to 8: Pillow would clip it."""
    if image.mode == "F":
        raise _UnfitError("pixels of 32-bit floating point")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise _UnfitError(f"levels from {levels.min()} to {levels.max()}, more than 16 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
