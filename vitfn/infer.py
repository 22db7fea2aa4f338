"""A model's config from the shapes of its leaves."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vitfn.config import VARIANTS, ResNetConfig, ViTConfig, get_config, model_names
from vitfn.errors import InputError, few
from vitfn.google import POSITIONS
from vitfn.layout import Shape

_BLOCK = "Transformer/encoderblock_0"


def infer(
    found: Mapping[str, Shape],
    fields: Mapping[str, Any],
    path: str,
    names: Iterable[str],
    class_slots: tuple[int, ...] = (1,),
) -> ViTConfig:
    """The config of a model with leaves of these shapes, by path; `fields` are known otherwise and come first.

    Where attention is stored without its heads, a published model's are assumed, or heads of 64. `class_slots` is as
    in `grid`. Raises InputError for what is no Vision Transformer, with some of the arrays' names in the file at
    `path`.
    """
    try:
        patch_size, _, channels, hidden_size = found["embedding/kernel"]
        sizes: dict[str, Any] = {
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_layers": depth(found),
            "mlp_dim": found[f"{_BLOCK}/MlpBlock_3/Dense_0/kernel"][1],
            "classifier": pooling(found),
            "resnet": _stem(found),
        }
        sizes["num_heads"] = fields.get("num_heads") or _heads(found, hidden_size, path)
        if sizes["resnet"]:
            channels = found["conv_root/kernel"][2]
        sizes |= {
            "channels": channels,
            "num_classes": found.get("head/bias", (0,))[0],
            "representation_size": found.get("pre_logits/bias", (None,))[0],
        }
        if "image_size" not in fields and fields.get("posemb") != "sincos2d":
            rows, columns = grid(found, sizes["classifier"] == "token", path, class_slots)
            sizes["image_size"] = image_size(rows, columns, patch_size, sizes["resnet"])
    except InputError:
        raise
    except (KeyError, IndexError, ValueError, OverflowError):
        raise InputError(
            f"{path}: found arrays ({few(sorted(names))}) that are not a plain Vision Transformer's"
        ) from None
    try:
        return ViTConfig(**(_published(sizes) | sizes | dict(fields)))
    except (InputError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: {error}") from None


def pooling(found: Mapping[str, Shape]) -> str:
    """How the tokens become one, a ViTConfig's `classifier`, by the leaves that are there."""
    return "token" if "cls" in found else "map" if "MAPHead_0/probe" in found else "gap"


def depth(found: Mapping[str, Shape]) -> int:
    """The number of encoder blocks."""
    return len({path.split("/")[1] for path in found if path.startswith("Transformer/encoderblock_")})


def image_size(rows: int, columns: int, patch_size: int, resnet: ResNetConfig | None) -> int | tuple[int, int]:
    """The size in pixels of an image of so many patches: the side of a square one, or (height, width)."""
    pixels = patch_size * math.prod(resnet.strides if resnet else ())
    return rows * pixels if rows == columns else (rows * pixels, columns * pixels)


def grid(
    found: Mapping[str, Shape],
    has_class: bool,
    path: str,
    class_slots: tuple[int, ...] = (1,),
    target: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The (rows, columns) of patches that position embeddings are for: a square, or of the ratio of a `target` grid.

    `class_slots` are how many positions a class token may have: 1, 0 or either. Where that is not known it has one:
    without, every grid of (k - 1) x (k + 1) patches would pass for k x k. Raises InputError where none fits.
    """
    _, tokens, _ = found[POSITIONS]
    if target and tokens - math.prod(target) in ((1, 0) if has_class else (0,)):
        return target
    for slots in class_slots if has_class else (0,):
        patches = max(tokens - slots, 0)
        side = math.isqrt(patches)
        if side and side * side == patches:
            return side, side
        if target and target[0] != target[1]:
            rows = math.isqrt(patches * target[0] // target[1])
            if rows and rows * rows * target[1] == patches * target[0] and patches % rows == 0:
                return rows, patches // rows
    known = f"{tokens} positions" + (", of which the class token may have one" if has_class else "")
    raise InputError(
        f"{path}: found {known}, which no square grid of patches has; say which with "
        "python -m vitfn.convert IN OUT --assume=image_size=HEIGHTxWIDTH"
    )


def _stem(found: Mapping[str, Shape]) -> ResNetConfig | None:
    if "conv_root/kernel" not in found:
        return None
    units = {tuple(name.split("/")[:2]) for name in found if name.startswith("block")}
    stages = [sum(block == f"block{i}" for block, _ in units) for i in range(1, len({block for block, _ in units}) + 1)]
    return ResNetConfig(tuple(stages), found["conv_root/kernel"][3] / 64)


def _heads(found: Mapping[str, Shape], hidden_size: int, path: str) -> int:
    query = found[f"{_BLOCK}/MultiHeadDotProductAttention_1/query/kernel"]
    if len(query) == 3:
        return query[1]
    published = {hidden: heads for hidden, _, heads, _ in VARIANTS.values()}
    if hidden_size not in published and hidden_size % 64:
        raise InputError(
            f"{path}: num_heads cannot be seen in this layout, and a width of {hidden_size} is no published model's; "
            "expected a config, or --assume=num_heads=..."
        )
    return published.get(hidden_size, hidden_size // 64)


def _published(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The name of the published model, or of the variant, that has these sizes, and the rate it is fine-tuned with."""
    for name in model_names():
        config = get_config(name)
        if all(getattr(config, field) == sizes[field] for field in _DISTINCT):
            return {"name": name, "dropout_rate": config.dropout_rate}
    for variant, row in VARIANTS.items():
        if row == tuple(sizes[field] for field in _DISTINCT[:4]) and not sizes["resnet"]:
            return {"name": f"ViT-{variant}_{sizes['patch_size']}"}
    return {}


_DISTINCT = ("hidden_size", "num_layers", "num_heads", "mlp_dim", "patch_size", "classifier", "resnet")
