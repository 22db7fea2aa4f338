"""Converts weights between layouts, and a model's size on the way: python -m vitfn.convert IN OUT [--to=LAYOUT]

IN is an npz, safetensors or torch file of a Vision Transformer in any layout that vitfn knows; `file.npz:params/img` is
a part of one. Or it is a run's checkpoint, a directory that several processes wrote or a file: its averaged weights.
OUT ends in .npz or .safetensors and is replaced; `file.npz:params/img` puts the arrays under a prefix.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl.flags import FlagValues
from torch import Tensor

from vitfn import flags, flagtypes
from vitfn.adapt import with_channels
from vitfn.checkpoint import Checkpoint, split_path
from vitfn.command import run_command
from vitfn.config import ViTConfig
from vitfn.errors import InputError
from vitfn.gathered import Gathered
from vitfn.layout import Layout
from vitfn.vit import shapes
from vitfn.weights import LAYOUTS, default_layout, read, save, save_leaves


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return run_command(convert, argv, flags.convert_flags, flags.assume_flags, arguments=("IN", "OUT"))


def convert(fv: FlagValues, source: str, destination: str) -> None:
    """The command: OUT is written whole, or not at all."""
    layout = LAYOUTS[fv.to or default_layout(destination)]
    with Checkpoint(source, flagtypes.parse_assumed(fv.assume)) as checkpoint:
        own = checkpoint.config
        target = _target(fv, own)
        class_names = checkpoint.class_names() if target.num_classes == own.num_classes else None
        if target == own and isinstance(checkpoint.file, Gathered):  # of any size: leaf by leaf
            said = checkpoint.said
            save_leaves(destination, _Leaves(checkpoint), checkpoint.found, own, class_names, layout.name)
        else:
            params, said = read(checkpoint, own, target)
            save(destination, params, target, class_names, layout.name, checkpoint.preprocessing)
    height, width = target.image_hw
    parameters = sum(map(math.prod, shapes(target).values()))
    rows = [
        ("from", f"{source} ({checkpoint.file.kind}, {checkpoint.layout.name})"),
        ("model", f"{target.name}, {height}x{width} px, {target.num_classes:,} classes, {parameters:,} parameters"),
        *(("changed", line) for line in said),
        ("to", f"{destination} ({layout.name}, {os.path.getsize(split_path(destination)[0]):,} bytes)"),
        *(("note", line) for line in caveats(target, layout)),
    ]
    for name, value in rows:
        print(f"{name:<10} {value}")


class _Leaves(Mapping):
    """The leaves of an open file by path, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __getitem__(self, path: str) -> Tensor:
        return self._checkpoint.read([path], self._checkpoint.config)[path]

    def __iter__(self) -> Iterator[str]:
        return iter(shapes(self._checkpoint.config))

    def __len__(self) -> int:
        return len(self._checkpoint.found)


def _target(fv: FlagValues, own: ViTConfig) -> ViTConfig:
    flag_of = {"image_size": "img_size", "num_classes": "num_classes", "channels": "channels"}
    fields: dict[str, Any] = {field: fv[flag].value for field, flag in flag_of.items() if fv[flag].value is not None}
    if fv.pre_logits == "drop":
        fields["representation_size"] = None
    try:
        return dataclasses.replace(with_channels(own, fields.get("channels", own.channels)), **fields)
    except InputError as error:
        raise InputError(f"--img_size, --num_classes, --channels: {error}") from None


def caveats(config: ViTConfig, layout: Layout) -> list[str]:
    """How the code that such files are for computes otherwise than this model does, unless it is told."""
    lines = []
    theirs_of = _GOOGLE | layout.assumed
    for field, what in _ARITHMETIC.items():
        if (found := getattr(config, field) or _GOOGLE[field]) != (theirs := theirs_of[field]):
            lines.append(f"this model has {what} {found}, {layout.name}'s own code {theirs} unless told otherwise")
    if config.resnet and layout.name in _HYBRIDS:
        lines.append(_HYBRIDS[layout.name])
    return lines


_GOOGLE: dict[str, Any] = {"gelu": "tanh", "layer_norm_eps": 1e-6, "posemb_resize": "bilinear_corners"}
_ARITHMETIC = {"gelu": "GELU", "layer_norm_eps": "LayerNorm epsilon", "posemb_resize": "positions resized by"}
_HYBRIDS = {
    "timm": "timm divides by sqrt(var + 1e-8) where Google standardises a kernel by (std + 1e-5): vitfn does as Google",
    "seed": "the seed pads, standardises and normalises otherwise than Google, as whom vitfn computes hybrids",
}

if __name__ == "__main__":
    sys.exit(main(sys.argv))
