"""How a model's owner makes pixels of an image: what timm's and transformers' JSON files say, in vitfn's terms."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

INTERPOLATIONS = ("bilinear", "bicubic")


class Preprocessing(NamedTuple):
    """How an image becomes one of the model's size, antialiased: it is resized, and its centre cut out.

    The centre is `fraction` (0 to 1) of the resized image, whose shorter side that is if it keeps its ratio, else of
    both. `down` rounds the centre's place down, as transformers does.
    """

    fraction: float = 1.0
    interpolation: str = "bilinear"
    keep_ratio: bool = True
    down: bool = False


def checked(found: Preprocessing) -> Preprocessing:
    """The same, or ValueError: a file says it."""
    _fraction(found.fraction)
    if found.interpolation not in INTERPOLATIONS or not all(isinstance(flag, bool) for flag in found[2:]):
        raise ValueError(f"found {found}, expected one of {', '.join(INTERPOLATIONS)}, and true or false")
    return found


class Stated(NamedTuple):
    """What a file says: mean and std as fields of the config, the preprocessing, a line for what is not followed."""

    fields: dict[str, Any]
    preprocessing: Preprocessing | None
    said: tuple[str, ...]


_RESAMPLE = {"0": "nearest", "1": "lanczos", "2": "bilinear", "3": "bicubic", "4": "box", "5": "hamming"}  # Pillow's
_KNOWN = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def of_timm(stated: Mapping[str, Any]) -> Stated:
    """From the `pretrained_cfg` of timm's config.json."""
    fields = {name: stated[name] for name in ("mean", "std") if stated.get(name) is not None}
    if not {"crop_pct", "interpolation", "crop_mode"} & stated.keys():
        return Stated(fields, None, ())
    interpolation, said = _interpolation(stated.get("interpolation", "bicubic"))
    mode, fraction = stated.get("crop_mode", "center"), stated.get("crop_pct") or 0.875  # timm's default
    if mode not in ("center", "squash"):
        said += (f"crop_mode {mode!r} is not followed: the centre is cropped",)
    return Stated(fields, Preprocessing(_fraction(fraction), interpolation, mode != "squash"), said)


def of_transformers(stated: Mapping[str, Any], image_hw: tuple[int, int]) -> Stated:
    """From transformers' preprocessor_config.json, for a model of images (height, width)."""
    others = [name for name in stated if name.startswith("do_") and stated[name] is True and name not in _KNOWN]
    said = tuple(f"{name} is not followed" for name in others)
    if stated.get("rescale_offset"):
        said += ("rescale_offset is not followed",)
    fields = _normalisation(stated)
    if not stated.get("do_resize", "size" in stated):
        unless = "" if "size" not in stated and "do_resize" not in stated else "do_resize false is not followed: "
        return Stated(fields, None, (*said, f"{unless}images are resized whole") if unless else said)
    interpolation, more = _interpolation(stated.get("resample", 2))
    size, crop = stated.get("size"), stated.get("crop_size") if stated.get("do_center_crop") else None
    edges, cut = _sides(size), _sides(crop)
    keep_ratio = "shortest_edge" in size if isinstance(size, Mapping) else crop is not None
    if edges is None:
        return Stated(fields, None, (*said, *more, f"size {size} is not followed: images are resized whole"))
    if cut is None and isinstance(stated.get("crop_pct"), float):  # as ConvNeXt's do, which shares the processor
        cut, edges, keep_ratio = edges, (edges[0] / stated["crop_pct"], edges[1] / stated["crop_pct"]), True
    cut = cut or edges
    if cut != image_hw:
        more += (f"is for {cut[0]:g}x{cut[1]:g} px: followed in proportion at {image_hw[0]}x{image_hw[1]}",)
    return Stated(
        fields, Preprocessing(_fraction(cut[0] / edges[0]), interpolation, keep_ratio, down=True), (*said, *more)
    )


def _fraction(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0.1 <= value <= 1:  # less makes a picture without bounds
        raise ValueError(f"a crop of {value} of the image, expected 0.1 to 1")
    return float(value)


def _sides(size: Any) -> tuple[float, float] | None:
    """(height, width) of transformers' ways to say a size, or None."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        height, width = (edge, edge) if edge else (size.get("height"), size.get("width"))
    else:
        height = width = size
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
        return height, width
    return None


def _interpolation(stated: Any) -> tuple[str, tuple[str, ...]]:
    """The nearest that there is, and a line where it is another."""
    name = _RESAMPLE.get(str(stated), str(stated))
    if name in INTERPOLATIONS:
        return name, ()
    nearest = "bilinear" if name in ("nearest", "box", "hamming") else "bicubic"
    return nearest, (f"interpolation {name!r} is not followed: {nearest}",)


def _normalisation(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The mean and std that do to x / 255 what (x factor - mean) / std does to pixels x, 0 to 255."""
    scale = 255 * stated.get("rescale_factor", 1 / 255) if stated.get("do_rescale", True) else 255.0
    scale = 1.0 if math.isclose(scale, 1) else scale
    if not stated.get("do_normalize", True):
        return {"mean": 0.0, "std": 1 / scale}
    fields = {ours: stated.get(theirs) for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))}
    return {
        name: [part / scale for part in value] if isinstance(value, list) else value / scale
        for name, value in fields.items()
        if value is not None
    }
