"""Google's npz files in and out: the original (2020) names and flax.linen's, read into one canonical tree."""

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfn import tree
from vitfn.archive import Archive, write_archive
from vitfn.config import ViTConfig, get_config, model_names
from vitfn.errors import InputError
from vitfn.files import replacing
from vitfn.tree import Tree
from vitfn.vit import shapes

_POSITIONS = "Transformer/posembed_input/pos_embedding"
_LARGEST_COMMENT = 65535  # bytes, in a ZIP archive
ASSUMED = "tanh GELU, LayerNorm epsilon 1e-6 and pixels in [-1, 1]"

# flax.linen numbers a block's layers by class, the 2020 files across classes.
_LINEN_TO_ORIGINAL = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
_NAMES_IN: dict[str, dict[str, str]] = {
    "original": {},
    "linen": {original: linen for linen, original in _LINEN_TO_ORIGINAL.items()},
}


def _rename(path: str, names: Mapping[str, str]) -> str:
    return "/".join(names.get(part, part) for part in path.split("/"))


class Description(NamedTuple):
    """A file's model: its config, its class names if it states them, and whether it states its config at all."""

    config: ViTConfig
    class_names: tuple[str, ...] | None
    stated: bool


def describe(path: str | os.PathLike) -> Description:
    """The model in a file, as the file states it, else inferred from the shapes of its arrays."""
    with Archive(path) as archive:
        config = _stated_config(archive)
        return Description(config or _infer(archive), _class_names(archive), stated=config is not None)


def stated_config(path: str | os.PathLike) -> ViTConfig | None:
    """The config that the file itself states, if it does; nothing is inferred."""
    with Archive(path) as archive:
        return _stated_config(archive)


def _comment(archive: Archive) -> dict[str, Any] | None:
    """The archive's comment, if it is one of ours."""
    try:
        comment = json.loads(archive.comment)
    except (ValueError, RecursionError):
        return None
    return comment if isinstance(comment, dict) and "vitfn" in comment else None


@contextlib.contextmanager
def _describing(path: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"{path}: found no description of a model that this version can read ({error})") from None


def _stated_config(archive: Archive) -> ViTConfig | None:
    """The config that the archive states, which has to fit its arrays."""
    if (comment := _comment(archive)) is None:
        return None
    with _describing(archive.path):
        config = ViTConfig(**comment["vitfn"]["config"])
    _compare(_shapes_by_path(archive), shapes(config), archive.path)
    return config


def _class_names(archive: Archive) -> tuple[str, ...] | None:
    if (comment := _comment(archive)) is None:
        return None
    names = comment["vitfn"].get("class_names")
    if beside := comment["vitfn"].get("class_names_in"):
        beside = str(Path(archive.path).with_name(beside))
        with _describing(beside):
            names = json.loads(Path(beside).read_bytes())["class_names"]
    return tuple(names) if names else None


def _canonical(archive: Archive) -> dict[str, str]:
    """The archive's own name of each canonical path."""
    names: dict[str, str] = {}
    for name in archive.shapes:
        if (path := _rename(name, _LINEN_TO_ORIGINAL)) in names:
            raise InputError(f"{archive.path}: found both {names[path]} and {name}, which are the same array")
        names[path] = name
    return names


def _shapes_by_path(archive: Archive) -> dict[str, tuple[int, ...]]:
    return {path: archive.shapes[name] for path, name in _canonical(archive).items()}


def _infer(archive: Archive) -> ViTConfig:
    found = _shapes_by_path(archive)
    block = "Transformer/encoderblock_0"
    try:
        patch_size, _, channels, hidden_size = found["embedding/kernel"]
        classifier = "token" if "cls" in found else "gap"
        _, tokens, _ = found[_POSITIONS]
        _, num_heads, _ = found[f"{block}/MultiHeadDotProductAttention_1/query/kernel"]
        _, mlp_dim = found[f"{block}/MlpBlock_3/Dense_0/kernel"]
        patches = tokens - (classifier == "token")
        sizes: dict[str, Any] = {
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_layers": len({path.split("/")[1] for path in found if path.startswith("Transformer/encoderblock_")}),
            "num_heads": num_heads,
            "mlp_dim": mlp_dim,
            "classifier": classifier,
        }
        num_classes, representation_size = found.get("head/bias", (1000,))[0], found.get("pre_logits/bias", (None,))[0]
        side = math.isqrt(patches)
    except (KeyError, IndexError, ValueError):
        names = ", ".join(sorted(found)[:3])
        raise InputError(
            f"{archive.path}: found arrays ({names}, ...) that are not a plain Vision Transformer's"
        ) from None
    if side * side != patches:
        raise InputError(f"{archive.path}: found {patches} patch positions, expected a square number of them")
    for name in model_names():
        published = get_config(name)
        if all(getattr(published, field) == value for field, value in sizes.items()):
            sizes |= {"name": name, "dropout_rate": published.dropout_rate}
    try:
        return ViTConfig(
            **sizes,
            image_size=side * patch_size,
            channels=channels,
            num_classes=num_classes,
            representation_size=representation_size,
        )
    except InputError as error:
        raise InputError(f"{archive.path}: {error}") from None


def load_npz(path: str | os.PathLike, config: ViTConfig | None = None) -> Tree:
    """The parameter tree of a file, float32 on the CPU, for `config` (without one: the file's own).

    A head of another class count, or none, becomes a head of zeros; a pre_logits layer that `config` lacks is dropped;
    position embeddings are resized to the config's grid; the log says each. Raises InputError for what is not an npz
    file of weights, and for missing, extra or misshapen arrays, with their names and shapes.
    """
    said = []
    with Archive(path) as archive:
        stated = _stated_config(archive)
        if config is None:
            config = stated or _infer(archive)
            if not stated:
                said.append(f"does not state its config; assumed a square image, {ASSUMED}")
        names, expected, found = _canonical(archive), shapes(config), _shapes_by_path(archive)
        adapted: dict[str, Tensor] = {}
        dropped: tuple[int, ...] = ()  # (width,) of a pre_logits layer that the head sat on
        if "pre_logits/kernel" in found and not config.representation_size:
            said.append(f"pre_logits {found.pop('pre_logits/kernel')} dropped: the model has none")
            dropped = found.pop("pre_logits/bias", ())
        kernel, bias = found.get("head/kernel"), found.get("head/bias")
        absent = kernel is None and bias is None
        other_classes = bias and bias != expected["head/bias"]
        other_width = kernel and kernel[:1] == dropped != expected["head/kernel"][:1]
        if absent or other_classes or other_width:
            said.append(f"head {kernel or 'none'} replaced by zeros {expected['head/kernel']}")
            found = {name: shape for name, shape in found.items() if name not in ("head/kernel", "head/bias")}
            adapted |= {name: torch.zeros(expected[name]) for name in ("head/kernel", "head/bias")}
        positions = found.get(_POSITIONS, ())
        same = config.grid == stated.grid if stated else positions == expected[_POSITIONS]
        if len(positions) == 3 and not same and positions[::2] == expected[_POSITIONS][::2]:
            old, new = (stated or _infer(archive)).grid, config.grid
            said.append(f"position embeddings resized from {old[0]}x{old[1]} to {new[0]}x{new[1]} patches")
            adapted[_POSITIONS] = resize_positions(archive.read(names[_POSITIONS]), old, new)
            del found[_POSITIONS]
        _compare(found, {name: shape for name, shape in expected.items() if name not in adapted}, path)
        for line in said:
            logging.getLogger("vitfn").warning("%s: %s", path, line)
        with ThreadPoolExecutor(4) as pool:  # reading and checksumming leave the interpreter lock
            leaves = pool.map(lambda name: adapted[name] if name in adapted else archive.read(names[name]), expected)
            return tree.unflatten(dict(zip(expected, leaves, strict=True)))


def _compare(found: Mapping[str, tuple], expected: Mapping[str, tuple], what: object) -> None:
    """An InputError that lists every difference between two sets of named shapes."""
    differences = [f"missing {name} {expected[name]}" for name in expected if name not in found]
    differences += [f"extra {name} {found[name]}" for name in found if name not in expected]
    for name in expected:
        if name in found and found[name] != expected[name]:
            differences.append(f"{name} has shape {found[name]}, expected {expected[name]}")
    if differences:
        raise InputError(f"{what}: not the arrays of this model: " + "; ".join(differences))


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (1, N, D) of a grid (rows, columns) for another; a class token's entry stays as it is.

    Corner-aligned bilinear in float64: scipy.ndimage.zoom(order=1), which Google's checkpoint.py calls.
    """
    extra = positions.shape[1] - math.prod(old)  # 1 with a class token, else 0
    grid = positions[0, extra:].T.reshape(1, -1, *old).double()  # (1, D, rows, columns)
    grid = F.interpolate(grid, new, mode="bilinear", align_corners=True)
    return torch.cat([positions[:, :extra], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def save_npz(
    path: str | os.PathLike,
    params: Tree,
    config: ViTConfig | None = None,
    class_names: Sequence[str] | None = None,
    layout: str = "original",
) -> None:
    """The tree as an npz file that Google's, timm's and the seed's code read; whole or not at all.

    With `config`, the file describes itself: config and class names are JSON in the ZIP comment or, where that would
    exceed 64 KB, the class names are in a .json file beside it. `layout` is 'original' (2020 names) or 'linen'.
    """
    if layout not in _NAMES_IN:
        raise InputError(f"layout: found {layout!r}, expected one of {', '.join(_NAMES_IN)}")
    if class_names and (config is None or len(class_names) != config.num_classes):
        expected = f"{config.num_classes}, as the config has" if config else "a config beside them"
        raise InputError(f"class_names: found {len(class_names)}, expected {expected}")
    flat = tree.flatten(params)
    comment = b""
    if config:
        _compare({name: tuple(leaf.shape) for name, leaf in flat.items()}, shapes(config), path)
        description: dict[str, Any] = {"config": dataclasses.asdict(config), "class_names": None}
        names = list(class_names) if class_names else None
        comment = json.dumps({"vitfn": description | {"class_names": names}}).encode()
        if len(comment) > _LARGEST_COMMENT:
            sidecar = Path(path).with_suffix(".json")
            with replacing(sidecar) as file:
                file.write(json.dumps({"class_names": names}).encode())
            comment = json.dumps({"vitfn": description | {"class_names_in": sidecar.name}}).encode()
    write_archive(path, {_rename(name, _NAMES_IN[layout]): leaf for name, leaf in flat.items()}, comment)
