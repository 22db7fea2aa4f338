"""Shows what a file of weights holds: python -m vitfn.inspect FILE"""

import math
import os
import sys
from collections import Counter

from absl.flags import FlagValues

from vitfn import flags, flagtypes
from vitfn.checkpoint import Checkpoint
from vitfn.command import run_command
from vitfn.config import ViTConfig
from vitfn.published import npz_bytes, published
from vitfn.vit import shapes


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return run_command(inspect, argv, flags.assume_flags, arguments=("FILE",))


def inspect(fv: FlagValues, path: str) -> None:
    """The command."""
    with Checkpoint(path, flagtypes.parse_assumed(fv.assume)) as checkpoint:
        for name, value in describe(checkpoint):
            print(f"{name:<14} {value}")
        print()
        print_arrays(checkpoint)


def describe(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """What there is to say of the model, line by line."""
    config, file = checkpoint.config, checkpoint.file
    (height, width), (rows, columns) = config.image_hw, config.grid
    size = os.path.getsize(file.path)
    pooling = config.classifier + (f", pre_logits {config.representation_size}" if config.representation_size else "")
    dtypes = Counter(file.dtypes[name] for name in checkpoint.arrays)
    lines = [
        ("file", f"{file.path}, {size:,} bytes, {file.kind}"),
        ("layout", checkpoint.layout.name + (f", under {checkpoint.prefix}" if checkpoint.prefix else "")),
        ("model", config.name + (f" (not stated; assumed {assumed})" if (assumed := checkpoint.assumed) else "")),
        ("parameters", f"{_parameters(checkpoint):,} in {len(checkpoint.arrays):,} arrays"),
        ("encoder", f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads, "
                    f"MLP {config.mlp_dim}"),
        ("image size", f"{height}x{width} px, {config.channels} channels, {rows}x{columns} patches"),
        ("pooling", pooling),
        ("positions", config.posemb),
        ("classes", _classes(checkpoint)),
        ("dtype", ", ".join(f"{name} ({count})" for name, count in dtypes.items())),
    ]  # fmt: skip
    if config.resnet:
        lines.insert(5, ("stem", f"ResNet, stages of {config.resnet.num_layers} units, {config.resnet.width} channels"))
    lines += [("published", _published(config, size))]
    lines += [("note", line) for line in checkpoint.said]
    if names := checkpoint.class_names():
        lines.append(("class names", ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")))
    return lines


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.file.shapes[name]) for name in checkpoint.arrays)


def _classes(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    if not config.num_classes:
        return "none: the model has no head"
    head = checkpoint.read(["head/kernel", "head/bias"], config)
    zero = not any(leaf.any() for leaf in head.values())
    return f"{config.num_classes:,}" + ("; the head is all zero, as in Google's imagenet21k files" if zero else "")


def _published(config: ViTConfig, size: int) -> str:
    """Which of Google's files have these arrays, and how many bytes."""
    own = shapes(config)
    same = [row for row in published() if shapes(row.config) == own]
    if not same:
        return "none of Google's files has these shapes"
    names = same[0].file + (f" and {len(same) - 1} more" if len(same) > 1 else "")
    more = size - (expected := npz_bytes(config))
    this = f"{abs(more):,} {'more' if more > 0 else 'fewer'} than" if more else "as many as"
    return f"the shapes of {names}; this file has {this} the {expected:,} bytes of such an npz"


def print_arrays(checkpoint: Checkpoint) -> None:
    """A table of the file's arrays in its own order, those that are no part of the model marked."""
    file = checkpoint.file
    width = max(map(len, file.shapes))
    print(f"{'array':<{width}}  {'shape':<20}  dtype")
    for name, shape in file.shapes.items():
        mark = "" if name in checkpoint.arrays else "  (not the model's)"
        print(f"{name:<{width}}  {'x'.join(map(str, shape)) or 'scalar':<20}  {file.dtypes[name]}{mark}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
