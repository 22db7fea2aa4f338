"""An open file of weights: which layout it has, which model it holds, and its leaves by canonical path."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitfn import foreign, google
from vitfn.adapt import average
from vitfn.archive import blaming
from vitfn.beside import Beside, beside
from vitfn.config import ViTConfig
from vitfn.containers import open_file
from vitfn.errors import InputError, few
from vitfn.google import POSITIONS
from vitfn.infer import grid, image_size, infer
from vitfn.layout import Layout, Shape
from vitfn.preprocessing import Preprocessing, checked
from vitfn.recognise import recognise
from vitfn.vit import shapes

_NAMED = 3  # arrays that an error names


class Checkpoint:
    """An open file of weights, or a folder that has one. `path` may name a part of it: `file.npz:params/img`.

    `arrays` are the canonical paths of each of the model's arrays, by its name in the file; `found` is the shapes of
    the leaves by path, as far as the file tells them; `elsewhere` names what the file holds beside the model; `stated`
    is the config that it states, if any. What is inferred otherwise gives way to the fields in `assume`. Raises
    InputError for what is no file of a Vision Transformer that vitfn computes.
    """

    def __init__(self, path: str | os.PathLike, assume: Mapping[str, Any] | None = None):
        self.path = os.fspath(path)
        filename, subtree = split_path(self.path)
        if (part := _PART.search(filename)) and int(part[1]) > 1:
            raise InputError(f"{filename}: found a part of a sharded model, expected its folder or its .index.json")
        with contextlib.ExitStack() as stack:
            self.file = stack.enter_context(open_file(filename))
            self._recognise(subtree)
            self.stated = self._stated()
            self._beside = Beside() if self._is_google or self.stated else self._read_beside()
            self._assume = dict(assume or {})
            self.close = stack.pop_all().close

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @functools.cached_property
    def config(self) -> ViTConfig:
        """The config that the file states, or else one inferred from names and shapes, into which all arrays fit."""
        if self.stated:
            return self.stated
        config = infer(self.found, self._known() | self._assume, self.path, self.arrays, self._class_slots)
        self._fit(config)
        return config

    def _fit(self, config: ViTConfig) -> None:
        """Notes which model the arrays are of, if they fit it."""
        self.compare(config)
        self._slotless = self.lacks_class_slot(config)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How the model's images are made, if the file or one beside it says so."""
        if (comment := _description(self.file.comment)) is None:
            return self._beside.preprocessing
        with _describing(self.path):
            said = comment["vitfn"].get("preprocessing")
            return checked(Preprocessing(**said)) if said else None

    @property
    def assumed(self) -> str:
        """What is taken for granted about the model, since neither the file nor one beside it states it."""
        config, known = self.config, {**self._beside.fields, **self._assume}
        if self.stated:
            return ""
        pixels = "pixels in [-1, 1]" if config.mean == config.std == 0.5 else f"mean {config.mean} and std {config.std}"
        assumed = {
            "num_heads": "" if self._is_google else f"{config.num_heads} heads",
            "image_size": "a square image" if config.posemb == "learn" else f"{config.image_size} px",
            "gelu": f"{config.gelu} GELU",
            "layer_norm_eps": f"LayerNorm epsilon {config.layer_norm_eps:g}",
            "mean": pixels,
        }
        return ", ".join(text for field, text in assumed.items() if text and field not in known)

    @property
    def _is_google(self) -> bool:
        return self.layout in google.LAYOUTS

    @property
    def _gammas(self) -> list[str]:
        """The paths of LayerScale (Touvron et al., arXiv 2103.17239), which reading folds into the layer before."""
        return [path for path in self.found if path.endswith("/gamma")]

    def _recognise(self, subtree: str) -> None:
        self.layout, self.prefix, self._others = recognise(self.file, subtree, self.path)
        own = {name.removeprefix(self.prefix): name for name in self.file.shapes if name.startswith(self.prefix)}
        inside = {name: self.file.shapes[full] for name, full in own.items()}
        plain = {name: name for name in inside} if self._is_google else foreign.plain_names(inside)
        self.arrays: dict[str, tuple[str, ...]] = {}
        self.found: dict[str, Shape] = {}
        for name, shape in inside.items():
            if name not in plain or re.fullmatch(self.layout.ignored, plain[name]):
                continue
            full = own[name]
            self.arrays[full] = self.layout.paths(plain[name], shape) or (full,)
            for path in self.arrays[full]:
                if path in self.found:
                    first = next(other for other, paths in self.arrays.items() if path in paths)
                    raise InputError(f"{self.path}: found both {first} and {full}, which are the same array")
                self.found[path] = self.layout.part(path, shape, len(self.arrays[full]))
        self.elsewhere = [name for name in self.file.shapes if name not in self.arrays]
        self._family = foreign.family(self.layout, self.prefix, self.found, inside)
        unknown = [own for own, paths in self.arrays.items() if paths == (own,)]
        if not self._is_google and (what := foreign.unsupported(self.found, unknown)):
            raise InputError(f"{self.path}: found {what}, which vitfn does not compute")

    def _stated(self) -> ViTConfig | None:
        """The config that the file states, which has to fit its arrays."""
        if (comment := _description(self.file.comment)) is None:
            return None
        with _describing(self.path):
            config = ViTConfig(**comment["vitfn"]["config"])
            if max(config.num_layers, sum(config.resnet.num_layers) if config.resnet else 0) > len(self.found):
                raise ValueError("more layers than there are arrays")
        self.compare(config)
        return config

    def _read_beside(self) -> Beside:
        with _describing(f"{self.file.path}: a JSON file beside it"):
            return beside(self.file.path, self.layout, self.found)

    @property
    def _is_big_vision(self) -> bool:
        return self.layout in (google.BIG_VISION, google.BIG_VISION_SCAN)

    @property
    def _class_slots(self) -> tuple[int, ...]:
        """How many positions the class token may have: none in big_vision, in most others one, in DeiT-III either."""
        if self._is_big_vision or self._beside.class_slot is False:
            return (0,)
        return (1, 0) if self._like_deit_3 else (1,)

    @property
    def _like_deit_3(self) -> bool:
        """Whether LayerScale beside a square number of positions, of which the class token can have none, says so."""
        _, tokens, _ = positions if len(positions := self.found.get(POSITIONS, ())) == 3 else (1, 0, 0)
        squares = [math.isqrt(max(patches, 0)) ** 2 == patches for patches in (tokens - 1, tokens)]
        known = self.layout is not foreign.TIMM or self._beside.class_slot is not None
        return bool(self._gammas and "cls" in self.found and not known and squares == [False, True])

    def _known(self) -> dict[str, Any]:
        """What files of this layout are known to have, and what is said beside this one."""
        if self._is_google:
            return {"posemb": "sincos2d"} if self._is_big_vision and POSITIONS not in self.found else {}
        assumed = self.layout.assumed | self._family
        if self.found.get("embedding/kernel", ())[2:3] != (3,):  # whose colours are not those that were averaged over
            assumed |= {name: average(assumed[name]) for name in ("mean", "std") if name in assumed}
        return assumed | self._beside.fields

    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where the file or one beside it states them."""
        if (comment := _description(self.file.comment)) is None:
            return self._beside.class_names
        with _describing(self.path):
            names, beside = comment["vitfn"].get("class_names"), comment["vitfn"].get("class_names_in")
            source = str(Path(self.file.path).with_name(beside)) if beside else self.path
        with _describing(source):
            names = json.loads(Path(source).read_bytes())["class_names"] if beside else names
            if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise TypeError(f"class names: found {str(names)[:40]}, expected a list of strings")
            if names and len(names) != self.config.num_classes:
                raise ValueError(f"{len(names)} class names, expected {self.config.num_classes}")
        return tuple(names) if names else None

    def config_for(self, target: ViTConfig) -> ViTConfig:
        """`target`, but with the sizes that the file has, where they are such as can be adapted to `target`'s.

        All the file's arrays fit into it; InputError names those that do not.
        """
        fields: dict[str, Any] = {}
        width, classes = self.found.get("pre_logits/bias", ()), self.found.get("head/bias", ())
        if len(width) == 1 and not target.representation_size:
            fields["representation_size"] = width[0]
        if "head/bias" not in self.found and "head/kernel" not in self.found:
            fields["num_classes"] = 0
        elif len(classes) == 1:
            fields["num_classes"] = classes[0]
        first = self.found.get("conv_root/kernel" if target.resnet else "embedding/kernel", ())
        if len(first) == 4 and first[2] not in (0, target.channels):
            known = vars(self.stated) if self.stated else {"mean": 0.5, "std": 0.5} | self._known()
            fields |= {"channels": first[2], "mean": known["mean"], "std": known["std"]}
        if self.stated:
            fields |= {"image_size": self.stated.image_size}
        elif target.posemb == "learn" and len(self.found.get(POSITIONS, ())) == 3:
            stem = (target.patch_size, target.resnet)
            has_class = "cls" in self.found or target.classifier == "token"
            rows_columns = grid(self.found, has_class, self.path, self._class_slots, target.grid)
            fields["image_size"] = self._known().get("image_size") or image_size(*rows_columns, *stem)
            if image_size(*target.grid, *stem) == fields["image_size"]:
                fields["image_size"] = target.image_size  # of hybrids more than one
        if target.posemb_resize is None:
            fields["posemb_resize"] = self.stated.posemb_resize if self.stated else self._known().get("posemb_resize")
        config = dataclasses.replace(target, **fields)
        self._fit(config)
        return config

    def lacks_class_slot(self, config: ViTConfig) -> bool:
        """Whether there is no position for the class token, as in big_vision and DeiT-III."""
        slotless = (1, config.num_tokens - 1, config.hidden_size)
        return config.classifier == "token" and self.found.get(POSITIONS) == slotless

    @property
    def lacks_attention_biases(self) -> bool:
        """Whether queries, keys and values have none, as in some of timm's models."""
        return not self._is_google and not any(path.endswith("/query/bias") for path in self.found)

    def _leaves(self, config: ViTConfig) -> dict[str, Shape]:
        """The shapes of a model's leaves as this file has them: without class slot or biases, or with LayerScale."""
        leaves = shapes(config)
        if self.lacks_class_slot(config):
            leaves[POSITIONS] = self.found[POSITIONS]
        if self.lacks_attention_biases:
            leaves = {path: shape for path, shape in leaves.items() if not _ATTENTION_BIAS.fullmatch(path)}
        return leaves | dict.fromkeys(self._gammas, (config.hidden_size,))

    def compare(self, config: ViTConfig) -> None:
        """Raises an InputError for differences between the file's arrays and the model's."""
        expected = self._leaves(config)
        names = {path: own for own, paths in self.arrays.items() for path in paths}
        parts: dict[str, list[str]] = {}
        for path in expected:
            own = names.get(path) or self.prefix + (self.layout.own(path, config) or path)
            parts.setdefault(own, []).append(path)
        with blaming(self.path, "found shapes that no model has"):
            wanted = {
                own: stored_shape(self.layout, {path: expected[path] for path in paths}) for own, paths in parts.items()
            }
        have = {}
        for own, paths in self.arrays.items():
            fits = own in wanted and all(self.found[path] == expected.get(path) for path in paths)
            have[own] = wanted[own] if fits else self.file.shapes[own]
        compare(have, wanted, self.path)

    def read(self, paths: Collection[str], config: ViTConfig) -> dict[str, Tensor]:
        """Leaves of a model `config` by path, float32, in memory of their own, which the arrays are read into."""
        expected = self._leaves(config)

        def leaves(own: str) -> list[tuple[str, Tensor]]:
            found = []
            for path, part in zip(self.arrays[own], self.file.read(own, len(self.arrays[own])), strict=True):
                leaf = self.layout.restore(path, part)
                if not (self.file.owned and leaf.is_contiguous()):
                    leaf = torch.empty(leaf.shape).copy_(leaf)
                found.append((path, leaf.reshape(expected[path])))
            return found

        wanted = {*paths, *self._gammas}
        names = [own for own, held in self.arrays.items() if not wanted.isdisjoint(held)]
        names.sort(key=lambda own: -math.prod(self.file.shapes[own]))  # while there is room for what is read and copied
        with ThreadPoolExecutor(4) as pool:  # reading and checksumming leave the interpreter lock
            done = tqdm(pool.map(leaves, names), "reading", len(names), leave=False, delay=2, disable=None)
            found = dict(leaf for several in done for leaf in several)
        if self.lacks_class_slot(config) and POSITIONS in found:
            slot = torch.full_like(found[POSITIONS][:, :1], -0.0)  # x + -0.0 is x, to the bit
            found[POSITIONS] = torch.cat([slot, found[POSITIONS]], dim=1)
        for gamma in self._gammas:
            for name in ("kernel", "bias"):
                if (scaled := gamma.replace("gamma", name)) in found:
                    found[scaled] *= found[gamma]
        return {path: found[path] for path in paths}

    @property
    def said(self) -> list[str]:
        """A line for each thing in which the tree will differ from the file, or that was chosen."""
        said = [*self._beside.said]
        if self._others:
            others = f"{self._others[0]!r}" + (f" and {len(self._others) - 1} more" if self._others[1:] else "")
            said.append(f"found the model under {self.prefix!r} and {others}: the first is read, FILE:PREFIX another")
        if left := [name for name in self.elsewhere if not name.startswith(tuple(self._others))]:
            words = (re.split(r"[./]", name.removeprefix(self.prefix))[0] for name in left)
            parts = list(dict.fromkeys("decoder" if word.startswith("decoder") else word for word in words))
            parts = left if len(left) <= _NAMED else parts
            count = "" if parts is left else f" ({len(left)} arrays)"
            said.append(f"{few(sorted(parts))}{count} ignored: no part of the model")
        if self._like_deit_3 and not self.stated and self._slotless:
            said.append("positions taken for those of a square grid, and none for the class token, as in DeiT-III")
        if self._gammas:
            said.append("LayerScale folded into the layer before it: the same function, up to rounding")
        if self.lacks_attention_biases:
            said.append("attention biases made zeros: the model has none")
        return said


_PART = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")
_ATTENTION_BIAS = re.compile(r".*/(query|key|value)/bias")


def split_path(path: str) -> tuple[str, str]:
    """'file.npz:params/img' -> ('file.npz', 'params/img/'); any other path is a file as a whole."""
    match = re.fullmatch(r"(.+\.(?:npz|safetensors|pth?|tar|bin|ckpt|pkl)):([^:\\]*)", path)
    if match is None or os.path.exists(path):
        return path, ""
    return match[1], match[2].strip("/") + "/" if match[2].strip("/") else ""


def stored_shape(layout: Layout, leaves: Mapping[str, Shape]) -> Shape:
    """The shape of the array that leaves of these shapes make together."""
    parts = [layout.store(path, torch.empty(shape, device="meta")).shape for path, shape in leaves.items()]
    return (sum(part[0] for part in parts), *parts[0][1:]) if len(parts) > 1 else tuple(parts[0])


def compare(found: Mapping[str, Shape], expected: Mapping[str, Shape], what: object) -> None:
    """An InputError for the differences between two sets of named shapes, of which it lists a few."""
    differences = [f"missing {name} {expected[name]}" for name in expected if name not in found]
    differences += [f"extra {name} {found[name]}" for name in found if name not in expected]
    for name in expected:
        if name in found and found[name] != expected[name]:
            differences.append(f"{name} has shape {found[name]}, expected {expected[name]}")
    if differences:
        more = f"; and {len(differences) - _NAMED} more" if differences[_NAMED:] else ""
        raise InputError(f"{what}: not the arrays of this model: " + "; ".join(differences[:_NAMED]) + more)


def _description(comment: bytes) -> dict[str, Any] | None:
    """The comment that vitfn wrote about the model, if it is one."""
    try:
        content = json.loads(comment)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and "vitfn" in content else None


@contextlib.contextmanager
def _describing(path: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, RecursionError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: found no description of a model that this version can read ({error})") from None
