"""Image files decoded against Pillow and numpy, torn and foreign ones; folders of them as datasets."""

import contextlib
import io
import logging
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitfn.data import Files, load
from vitfn.data.images import decode
from vitfn.errors import InputError


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def decoded(path: Path, channels: int = 3) -> np.ndarray:
    """As (H, W, C), without a word of Pillow's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode(str(path), channels)
    assert image.dtype == torch.uint8
    image = image.permute(1, 2, 0)
    assert image.is_contiguous()
    return image.numpy()


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# --- decode


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_formats_give_their_pixels_whatever_the_name(form, tmp_path):
    want, path = pixels(5, 7, 3), tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.fromarray(want), form, **({"lossless": True} if form == "WEBP" else {})))
    np.testing.assert_array_equal(decoded(path), want)


def test_jpeg_is_pillow_s(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels(33, 17, 3)).save(path)
    np.testing.assert_array_equal(decoded(path), np.asarray(Image.open(path)))


UPRIGHT = {  # where EXIF says that row 0 and column 0 are, of (H, W, C) as stored
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_images_upright(form, orientation, tmp_path):
    image, exif = Image.fromarray(pixels(6, 10, 3)), Image.Exif()
    exif[0x0112] = orientation
    plain, turned = tmp_path / "plain", tmp_path / "turned"
    plain.write_bytes(encoded(image, form))
    turned.write_bytes(encoded(image, form, exif=exif))
    np.testing.assert_array_equal(decoded(turned), UPRIGHT[orientation](decoded(plain)))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_exif_does_no_harm(exif, tmp_path):
    image, path = Image.fromarray(pixels(6, 10, 3)), tmp_path / "a.jpg"
    path.write_bytes(encoded(image, "JPEG", exif=exif))
    assert decoded(path).shape == (6, 10, 3)


def test_grey_becomes_rgb_and_rgb_grey(tmp_path):
    grey, colour = pixels(4, 5), pixels(4, 5, 3)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    np.testing.assert_array_equal(decoded(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, 2))
    np.testing.assert_array_equal(decoded(tmp_path / "grey.png", 1), grey[:, :, None])
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert np.abs(decoded(tmp_path / "colour.png", 1)[:, :, 0] - luma).max() <= 1


def test_alpha_is_kept_for_four_channels_and_dropped_for_three(tmp_path):
    rgba, rgb = pixels(4, 5, 4), pixels(4, 5, 3)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(decoded(tmp_path / "rgba.png", 4), rgba)
    np.testing.assert_array_equal(decoded(tmp_path / "rgba.png"), rgba[:, :, :3])
    np.testing.assert_array_equal(decoded(tmp_path / "rgb.png", 4), np.dstack([rgb, np.full((4, 5), 255, np.uint8)]))


def test_palettes_with_transparency(tmp_path):
    index, palette, alpha = pixels(4, 5) % 3, pixels(3, 3, seed=1), bytes([0, 128, 255])
    image = Image.fromarray(index, "L")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png", transparency=alpha)
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), palette[index])
    want = np.dstack([palette[index], np.frombuffer(alpha, np.uint8)[index]])
    np.testing.assert_array_equal(decoded(tmp_path / "a.png", 4), want)


def test_one_bit_images_are_black_and_white(tmp_path):
    want = pixels(4, 9) > 127
    Image.fromarray(want).save(tmp_path / "a.png")
    np.testing.assert_array_equal(decoded(tmp_path / "a.png", 1)[:, :, 0], np.where(want, 255, 0))


def test_cmyk_becomes_rgb(tmp_path):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, :, 0] = 255  # cyan alone
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(decoded(tmp_path / "a.jpg").astype(int) - [0, 255, 255]).max() <= 3
    assert decoded(tmp_path / "a.jpg", 1).shape == (16, 16, 1)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_of_16_bits_is_scaled(form, channels, tmp_path):
    levels = np.linspace(0, 65535, 300).astype(np.uint16).reshape(15, 20)
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(levels), form))
    found = decoded(tmp_path / "a.png", channels)
    np.testing.assert_array_equal(found[:, :, 0], np.rint(levels / 257))
    assert found.shape == (15, 20, channels)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), level, np.uint8)) for level in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (decoded(tmp_path / "a.gif") == 10).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_npy_files_hold_any_number_of_channels(channels, tmp_path):
    want = pixels(4, 6, channels)
    np.save(tmp_path / "a.npy", want)
    np.testing.assert_array_equal(decoded(tmp_path / "a.npy", channels), want)
    np.save(tmp_path / "b.npy", np.asfortranarray(want))
    np.testing.assert_array_equal(decoded(tmp_path / "b.npy", channels), want)


# --- what is no image


def refusal(path: Path, channels: int = 3) -> str:
    with pytest.raises(InputError, match="expected an image") as caught:
        decoded(path, channels)
    assert str(caught.value).startswith(f"{path}: found ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


TORN = {
    "jpeg": ("JPEG", {}),
    "progressive jpeg": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "bmp": ("BMP", {}),
    "gif": ("GIF", {}),
    "tiff": ("TIFF", {}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}),
}
TRAILER = {"png": 20, "bmp": 2, "gif": 2}  # bytes behind the pixels, without which these are whole


@pytest.mark.parametrize("kind", TORN)
def test_files_torn_anywhere_are_refused(kind, tmp_path):
    form, options = TORN[kind]
    path, whole = tmp_path / "a.jpg", encoded(Image.fromarray(pixels(12, 10, 3)), form, **options)
    path.write_bytes(whole)
    want = decoded(path)
    trailer = TRAILER.get(kind, 0)
    for length in range(len(whole) - trailer):
        path.write_bytes(whole[:length])
        refusal(path)
    for length in range(len(whole) - trailer, len(whole)):
        path.write_bytes(whole[:length])
        np.testing.assert_array_equal(decoded(path), want)


def test_torn_npy_files_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", pixels(3, 4, 5))
    whole = (tmp_path / "a.npy").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "a.npy").write_bytes(whole[:length])
        refusal(tmp_path / "a.npy", 5)


@settings(max_examples=60)
@given(st.data())
def test_damaged_files_are_images_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.png"
    form = data.draw(st.sampled_from(sorted(TORN)))
    whole = bytearray(encoded(Image.fromarray(pixels(12, 10, 3)), *TORN[form][:1], **TORN[form][1]))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    with contextlib.suppress(InputError):
        assert decoded(path).shape[2] == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jpg", b""),
        ("text.jpg", b"not an image\n" * 50),
        ("page.png", b"<!DOCTYPE html><html></html>"),
        ("vector.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        ("empty.npy", b""),
        ("archive.npy", b"PK\x03\x04" + bytes(60)),
        ("pickle.npy", b"\x80\x04\x95" + bytes(60)),
    ],
)
def test_foreign_files_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    refusal(tmp_path / name)


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "a.jpg")
    refusal(tmp_path)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_by_their_headers(tmp_path):
    (tmp_path / "a.png").write_bytes(png(60_000, 60_000))
    assert "3600000000 pixels" in refusal(tmp_path / "a.png")


def test_a_npy_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", pixels(2, 2, 3))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole.replace(b"(2, 2, 3), }        ", b"(200000, 200000, 3)}"))
    assert b"200000" in (tmp_path / "a.npy").read_bytes()
    refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("array", [pixels(4, 6), pixels(4, 6, 2), np.zeros((4, 6, 3)), np.zeros((0, 6, 3), np.uint8)])
def test_npy_files_of_another_shape_or_type_are_refused(array, tmp_path):
    np.save(tmp_path / "a.npy", array)
    assert str(array.shape) in refusal(tmp_path / "a.npy")


def test_objects_in_npy_files_are_not_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    refusal(tmp_path / "a.npy")


def test_pictures_are_refused_for_other_numbers_of_channels(tmp_path):
    Image.fromarray(pixels(4, 4, 3)).save(tmp_path / "a.png")
    assert "a .npy file of (H, W, 5)" in refusal(tmp_path / "a.png", 5)


@pytest.mark.parametrize("array", [np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32)])
def test_levels_beyond_16_bits_are_refused(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "a.tif")
    refusal(tmp_path / "a.tif")


# --- folders


def make(root: Path, *names: str) -> None:
    """Files that look like images by their names: no folder is decoded before its images are needed."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def labelled(files, root: Path, class_names: tuple[str, ...]) -> list[tuple[str, str]]:
    assert isinstance(files, Files)
    names = [Path(path).relative_to(root).as_posix() for path in files.paths]
    return list(zip(names, (class_names[label] for label in files.labels.tolist()), strict=True))


def test_train_and_val_have_the_classes_of_their_sub_folders(tmp_path):
    make(tmp_path, "train/dog/1.jpg", "train/cat/2.png", "train/cat/deep/er/1.JPEG", "val/dog/1.webp")
    data = load("folder", str(tmp_path), channels=1)
    assert data.class_names == ("cat", "dog")
    assert labelled(data.train, tmp_path / "train", data.class_names) == [
        ("cat/2.png", "cat"),
        ("cat/deep/er/1.JPEG", "cat"),
        ("dog/1.jpg", "dog"),
    ]
    assert labelled(data.test, tmp_path / "val", data.class_names) == [("dog/1.webp", "dog")]
    assert (data.train.size, data.train.channels, data.train.labels.dtype) == (3, 1, torch.int64)


@pytest.mark.parametrize(("present", "used"), [(("validation", "test"), "validation"), (("test",), "test")])
def test_validation_and_test_stand_in_for_val(present, used, tmp_path):
    make(tmp_path, "train/a/1.jpg", *(f"{name}/a/{name}.jpg" for name in present))
    assert load("folder", str(tmp_path)).test.paths == (str(tmp_path / used / "a" / f"{used}.jpg"),)


def test_hidden_files_are_left_out_and_others_counted(tmp_path, caplog):
    make(tmp_path, "train/a/1.jpg", "train/a/.2.jpg", "train/a/.git/3.jpg", "train/.cache/4.jpg")
    make(tmp_path, "train/a/Thumbs.db", "train/a/notes.txt", "val/a/1.jpg")
    with caplog.at_level(logging.WARNING, "vitfn"):
        data = load("folder", str(tmp_path))
    assert data.train.paths == (str(tmp_path / "train/a/1.jpg"),)
    [record] = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'train'}: left out 2 files")


def test_a_single_folder_is_split_by_class(tmp_path):
    make(tmp_path, *(f"a/{i}.jpg" for i in range(40)), *(f"b/{i}.jpg" for i in range(20)), "c/1.jpg")
    data = load("folder", str(tmp_path), val_fraction=0.25)
    train, test = (labelled(files, tmp_path, data.class_names) for files in (data.train, data.test))
    assert not set(train) & set(test)
    assert len(set(train) | set(test)) == 61
    assert all(name.split("/")[0] == label for name, label in train + test)
    assert [sum(label == name for _, label in test) for name in "abc"] == [10, 5, 0]
    assert train == sorted(train)


def test_the_split_is_a_function_of_seed_and_names(tmp_path):
    """Neither of where the folder lies, nor of the order in which its files were made."""
    names = [f"{label}/{i}.jpg" for label in "ab" for i in range(30)]
    make(tmp_path / "one", *names)
    make(tmp_path / "two" / "deep", *reversed(names))

    def split(root: Path, seed: int) -> list[str]:
        return [Path(path).relative_to(root).as_posix() for path in load("folder", str(root), seed=seed).test.paths]

    assert split(tmp_path / "one", 0) == split(tmp_path / "two" / "deep", 0)
    assert split(tmp_path / "one", 0) != split(tmp_path / "one", 1)
    assert {name[2:] for name in split(tmp_path / "one", 0) if name[0] == "a"} != {
        name[2:] for name in split(tmp_path / "one", 0) if name[0] == "b"
    }


def test_a_relative_folder_is_split_as_an_absolute_one(tmp_path, monkeypatch):
    make(tmp_path, *(f"a/{i}.jpg" for i in range(30)))
    monkeypatch.chdir(tmp_path)
    want = [Path(path).name for path in load("folder", str(tmp_path)).test.paths]
    assert [Path(path).name for path in load("folder", ".").test.paths] == want


def test_a_class_named_train_is_a_class(tmp_path):
    make(tmp_path, *(f"{name}/{i}.jpg" for name in ("train", "bus") for i in range(10)))
    assert load("folder", str(tmp_path)).class_names == ("bus", "train")


@pytest.mark.parametrize(
    ("files", "where", "message"),
    [
        (["train/1.jpg", "val/1.jpg"], "train", "no sub-folders"),
        (["1.jpg"], "", "no sub-folders"),
        (["train/a/1.jpg", "train/b/x.txt", "val/a/1.jpg"], "train/b", "no images"),
        (["a/1.jpg", "b/.1.jpg"], "b", "no images"),
        (["train/a/1.jpg", "val/a/1.txt"], "val", "no images"),
        (["train/a/1.jpg", "val/a/1.jpg", "val/z/1.jpg"], "val/z", "a class that is not in"),
        (["train/a/1.jpg"], "", "none of val, validation, test beside it"),
    ],
)
def test_folders_that_are_not_so_are_refused_by_name(files, where, message, tmp_path):
    make(tmp_path, *files)
    with pytest.raises(InputError, match=message) as caught:
        load("folder", str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / where}: found ")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load("folder", str(tmp_path / "absent"))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan"), 0.01])
def test_fractions_that_leave_a_split_empty_are_refused(fraction, tmp_path):
    make(tmp_path, *(f"a/{i}.jpg" for i in range(10)))
    with pytest.raises(InputError, match=f"--val_fraction: found {fraction}"):
        load("folder", str(tmp_path), val_fraction=fraction)
