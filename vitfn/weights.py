"""Weights in and out: any file of a Vision Transformer read into the canonical tree, and the tree in any layout."""

import dataclasses
import json
import logging
import os
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfn import foreign, google, tree
from vitfn.adapt import adaptation
from vitfn.checkpoint import Checkpoint, compare, split_path
from vitfn.config import ViTConfig
from vitfn.containers import RUN_FILES, located, write_file
from vitfn.errors import InputError
from vitfn.files import replacing
from vitfn.google import POSITIONS
from vitfn.layout import Layout, Shape
from vitfn.preprocessing import Preprocessing
from vitfn.tree import Tree
from vitfn.vit import shapes, sincos2d

LAYOUTS = {layout.name: layout for layout in (*google.LAYOUTS, *foreign.LAYOUTS)}  # that can be written
Place = Callable[[str, Tensor], Tensor]  # of a leaf by its path, on its way into a tree
_LARGEST_COMMENT = 65535  # bytes, in a ZIP archive


class Description(NamedTuple):
    """A file's model: its config, its class names if it states them, and whether it states its config at all."""

    config: ViTConfig
    class_names: tuple[str, ...] | None
    stated: bool


class Details(NamedTuple):
    """A `Description`, how the model's images are made if that is said, and what had to be assumed, in words."""

    description: Description
    preprocessing: Preprocessing | None
    assumed: str


def describe(path: str | os.PathLike) -> Description:
    """The model in a file, as it or one beside it states, else inferred from the names and shapes of its arrays."""
    return details(path).description


def details(path: str | os.PathLike) -> Details:
    """`describe`, with what `vitfn.predict` and `vitfn.train` need to know beside."""
    with Checkpoint(path) as checkpoint:
        stated = checkpoint.stated is not None
        description = Description(checkpoint.config, checkpoint.class_names(), stated)
        return Details(description, checkpoint.preprocessing, checkpoint.assumed)


def find(model: str) -> tuple[str, dict[str, Any]]:
    """The file of weights, and the flags of the run it belongs to, if MODEL is a run's directory."""
    path = located(model)
    if Path(path).name not in RUN_FILES or not Path(model).is_dir():
        return path, {}
    try:
        return path, json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{Path(model) / 'config.json'}: expected a run's config, found: {error}") from None


def load(path: str | os.PathLike, config: ViTConfig | None = None, place: Place | None = None) -> Tree:
    """The parameter tree of a file in any layout, float32 on the CPU, for `config` (without one: the file's own).

    npz, safetensors and torch files are read, and folders that hold one. A head of another class count, or none,
    becomes a head of zeros; a pre_logits layer that `config` lacks is dropped; position embeddings are resized to the
    config's grid, as the file's owner does unless the config says how, and input channels to its channels; LayerScale
    is folded into the layer before it; the log says each. `place(path, leaf)` puts each leaf elsewhere, or keeps a part
    of it, before the next is read. Raises InputError for what is no file of weights, and for missing, extra or
    misshapen arrays, with names and shapes of a few of them.
    """
    with Checkpoint(path) as checkpoint:
        own = checkpoint.config_for(config) if config else checkpoint.config
        params, said = read(checkpoint, own, config or own, place)
        if config is None and checkpoint.assumed:
            said.insert(0, f"does not state its config; assumed {checkpoint.assumed}")
    for line in said:
        logging.getLogger("vitfn").warning("%s: %s", path, line)
    return params


def read(
    checkpoint: Checkpoint, own: ViTConfig, target: ViTConfig, place: Place | None = None
) -> tuple[Tree, list[str]]:
    """The tree of an open file for the model `target`, and a line for each change.

    `own` is the file's model: its `config`, or `config_for(target)`. `place` is as in `load`.
    """
    to, wanted = adaptation(own, target), shapes(target)
    reached = shapes(to.config)
    compare(reached | dict.fromkeys(to.zeros, ()), wanted | dict.fromkeys(to.zeros, ()), checkpoint.path)
    needed = [path for path in wanted if path not in to.zeros and path in checkpoint.found]

    def leaves(paths: Set[str]) -> dict[str, Tensor]:
        together = {other for path in paths for other in (path, *to.beside.get(path, ()))}
        read = checkpoint.read([path for path in together if path in needed], own)
        for path in paths - read.keys():  # a new head, and attention biases that the model does not have
            read[path] = torch.zeros(wanted[path])
        changed = {
            path: to.change[path](read[path], *(read[other] for other in to.beside.get(path, ())))
            for path in paths & to.change.keys()
        }
        return read | changed

    found = {path: place(path, leaves({path})[path]) for path in wanted} if place else leaves(wanted.keys())
    return tree.unflatten({path: found[path] for path in wanted}), [*checkpoint.said, *to.said]


def save(
    path: str | os.PathLike,
    params: Tree,
    config: ViTConfig | None = None,
    class_names: Sequence[str] | None = None,
    layout: str | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """The tree in a layout, by default 'original' in an npz file and 'timm' in safetensors; whole or not at all.

    The path's suffix, .npz or .safetensors, chooses the format; `file.npz:params/img` puts the arrays under a prefix,
    `file.npz:` under none. With `config`, the file describes itself: config, class names and `preprocessing`, how its
    images are made, are JSON in the ZIP comment or the safetensors metadata or, where they would exceed a comment's 64
    KB, the class names are in a .json file beside it. Raises InputError for an unknown layout, and for a model that the
    layout has no place for.
    """
    flat = tree.flatten(params)
    found = {name: tuple(leaf.shape) for name, leaf in flat.items()}
    save_leaves(path, flat, found, config, class_names, layout, preprocessing)


def save_leaves(
    path: str | os.PathLike,
    leaves: Mapping[str, Tensor],
    found: Mapping[str, Shape],
    config: ViTConfig | None = None,
    class_names: Sequence[str] | None = None,
    layout: str | None = None,
    preprocessing: Preprocessing | None = None,
    writes: bool = True,
) -> None:
    """`save` of leaves by path, of the shapes `found`, each of which may be made when it is asked for.

    Where several processes make it together, all call this, and one `writes`.
    """
    flat: MutableMapping[str, Tensor] = ChainMap({}, leaves)  # type: ignore[arg-type]  # the first is written to
    filename, prefix = split_path(os.fspath(path))
    layout = layout or default_layout(filename)
    if layout not in LAYOUTS:
        raise InputError(f"layout: found {layout!r}, expected one of {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    if class_names and (config is None or len(class_names) != config.num_classes):
        expected = f"{config.num_classes}, as the config has" if config else "a config beside them"
        raise InputError(f"class_names: found {len(class_names)}, expected {expected}")
    if config:
        compare(found, shapes(config), path)
    elif chosen not in google.LAYOUTS:
        raise InputError(f"layout={layout}: found no config, expected one, which other people's names depend on")
    if config and config.posemb == "sincos2d" and chosen not in google.LAYOUTS:
        flat[POSITIONS] = sincos2d(config, torch.empty(0))
        config = dataclasses.replace(config, posemb="learn")
    arrays = stored(flat, config or ViTConfig(), chosen, prefix if filename != os.fspath(path) else chosen.prefix)
    if writes:
        write_file(filename, arrays, _comment(filename, config, class_names, preprocessing) if config else b"")
    else:
        for _ in arrays:  # one leaf after the other is whole
            pass


def default_layout(filename: str) -> str:
    """What a file of this name is usually written in."""
    return "timm" if filename.endswith(".safetensors") else "original"


def _comment(
    filename: str, config: ViTConfig, class_names: Sequence[str] | None, preprocessing: Preprocessing | None
) -> bytes:
    names = list(class_names) if class_names else None
    description: dict[str, Any] = {"config": dataclasses.asdict(config), "class_names": names}
    if preprocessing:
        description["preprocessing"] = preprocessing._asdict()
    comment = json.dumps({"vitfn": description}).encode()
    if len(comment) > _LARGEST_COMMENT:
        sidecar = Path(filename).with_suffix(".json")
        with replacing(sidecar) as file:
            file.write(json.dumps({"class_names": names}).encode())
        del description["class_names"]
        comment = json.dumps({"vitfn": {**description, "class_names_in": sidecar.name}}).encode()
    return comment


def stored(flat: Mapping[str, Tensor], config: ViTConfig, layout: Layout, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The arrays of a layout, by name, from the leaves of a tree by path."""
    flat = ChainMap({}, flat)  # type: ignore[arg-type]
    if config.classifier not in layout.classifiers:
        raise InputError(f"layout={layout.name}: found the classifier {config.classifier!r}, for which it has no place")
    if layout.name.startswith("huggingface") and config.representation_size and config.num_classes:
        raise InputError(
            f"layout={layout.name}: found a pre_logits layer under a head, expected one of them: drop the layer, or "
            "the head (--pre_logits=drop, --num_classes=0)"
        )
    if layout.name.startswith("big_vision") and "cls" in flat and POSITIONS in flat:
        flat["cls"] = flat["cls"] + flat[POSITIONS][:, :1]  # big_vision's class token has no position
        flat[POSITIONS] = flat[POSITIONS][:, 1:]
    groups: dict[str, list[str]] = {}
    for path in flat:
        if not (own := layout.own(path, config)):
            raise InputError(f"layout={layout.name}: found {path}, for which it has no place")
        groups.setdefault(own, []).append(path)
    return _joined(flat, groups, layout, prefix)


def _joined(
    flat: Mapping[str, Tensor], groups: Mapping[str, list[str]], layout: Layout, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    for own, paths in groups.items():
        parts = [layout.store(path, flat[path]) for path in paths]
        yield prefix + own, torch.cat(parts) if len(parts) > 1 else parts[0]


def load_npz(path: str | os.PathLike, config: ViTConfig | None = None) -> Tree:
    """`load`, by the name that people with npz files look for."""
    return load(path, config)


def save_npz(
    path: str | os.PathLike,
    params: Tree,
    config: ViTConfig | None = None,
    class_names: Sequence[str] | None = None,
    layout: str = "original",
) -> None:
    """`save` as npz, with the names of 2020, which Google's, timm's and the seed's code read."""
    if not split_path(os.fspath(path))[0].endswith(".npz"):
        raise InputError(f"{path}: expected a path that ends in .npz")
    save(path, params, config, class_names, layout)
