"""A model's config from the shapes of its leaves."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vitfn.config import VARIANTS, ResNetConfig, ViTConfig, get_config, model_names
from vitfn.errors import InputError
from vitfn.google import POSITIONS
from vitfn.layout import Shape

_BLOCK = "Transformer/encoderblock_0"


def infer(found: Mapping[str, Shape], fields: Mapping[str, Any], path: str, names: Iterable[str]) -> ViTConfig:
    """The config of a model with leaves of these shapes, by path; `fields` are known otherwise and come first.

    Where attention is stored without its heads, a published model's are assumed, or heads of 64. Raises InputError for
    what is no Vision Transformer, with some of the arrays' names in the file at `path`.
    """
    try:
        patch_size, _, channels, hidden_size = found["embedding/kernel"]
        sizes: dict[str, Any] = {
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_layers": len({name.split("/")[1] for name in found if name.startswith("Transformer/encoderblock_")}),
            "mlp_dim": found[f"{_BLOCK}/MlpBlock_3/Dense_0/kernel"][1],
            "classifier": "token" if "cls" in found else "map" if "MAPHead_0/probe" in found else "gap",
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
            sizes["image_size"] = image_size(found, sizes, path)
    except InputError:
        raise
    except (KeyError, IndexError, ValueError, OverflowError):
        listed = ", ".join(sorted(names)[:3])
        raise InputError(f"{path}: found arrays ({listed}, ...) that are not a plain Vision Transformer's") from None
    try:
        return ViTConfig(**(_published(sizes) | sizes | dict(fields)))
    except (InputError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: {error}") from None


def image_size(found: Mapping[str, Shape], sizes: Mapping[str, Any], path: str) -> int:
    """The side in pixels of the square image that the position embeddings are for."""
    _, tokens, _ = found[POSITIONS]
    slots = (1, 0) if sizes["classifier"] == "token" else (0,)  # big_vision and DeiT-III have none for the class token
    for slot in slots:
        side = math.isqrt(max(tokens - slot, 0))
        if side and side * side == tokens - slot:
            return side * sizes["patch_size"] * math.prod(sizes["resnet"].strides if sizes["resnet"] else ())
    raise InputError(f"{path}: found {tokens - slots[0]} patch positions, expected a square number of them")


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
