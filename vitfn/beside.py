"""What lies beside a file of weights: the JSON files of timm's and transformers' models.

What they state is followed, or refused by name; if they are another model's they are left alone, and that is said.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vitfn import preprocessing
from vitfn.errors import InputError
from vitfn.google import POSITIONS
from vitfn.infer import depth, pooling
from vitfn.layout import Layout, Shape
from vitfn.preprocessing import Preprocessing, Stated

_GELU = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu_tanh": "tanh"}
# The layouts of transformers' models, by the start of their model_type.
_MODEL_TYPES = {
    "huggingface": r"vit|deit|vit_mae|vit_msn|ijepa",
    "huggingface5": r"vit|deit|vit_mae|vit_msn|ijepa",
    "huggingface_dinov2": r"dinov2.*",
    "huggingface_siglip": r"siglip.*",
}
_TRANSFORMERS = {
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "layer_norm_eps",
    "image_size": "image_size",
    "hidden_dropout_prob": "dropout_rate",
    "attention_probs_dropout_prob": "attention_dropout_rate",
}
_OF_TRANSFORMERS = {*_TRANSFORMERS, "model_type", "hidden_size", "hidden_act", "id2label", "vision_config"}
_SIZES = {  # by the names of transformers and timm
    "hidden_size": ("hidden_size", "embed_dim"),
    "num_layers": ("num_hidden_layers", "depth"),
    "mlp_dim": ("intermediate_size",),
    "patch_size": ("patch_size",),
    "channels": ("num_channels", "in_chans"),
}
_POOLS = {"token": "token", "avg": "gap", "map": "map"}
# Arguments of timm's VisionTransformer that the arrays show, or that change nothing of what is computed.
_SHOWN = re.compile(
    r"img_size|patch_size|in_chans|embed_dim|depth|num_heads|mlp_ratio|num_classes|global_pool|class_token|no_embed_class"
    r"|act_layer|qkv_bias|qk_norm|init_values|reg_tokens|pre_norm|fc_norm|proj_bias|pos_embed|.*drop.*|weight_init|fix_init"
    r"|dynamic_img_.*|strict_img_size|device|dtype|pretrained.*|checkpoint_path|scriptable|exportable|no_jit|cache_dir"
)
# What timm's architectures have and neither arrays nor config.json show.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    r"vit_(base_patch32|giantopt_patch16|so400m_patch16)_siglip_.*|vit_large_patch16_siglip_(gap_)?512": {
        "gelu": "tanh"
    },
    r"vit_base_patch16_gap_224": {"num_heads": 16},
    r"test_vit": {"num_heads": 2},
}
_SLOTLESS = r"flexivit_.*|deit3_.*"  # architectures whose class token has no position


class Beside(NamedTuple):
    """What is said beside a file: fields of the config, whether its class token has a position, its classes' names, its
    preprocessing, and a line for each thing that is not followed."""

    fields: dict[str, Any] = {}  # noqa: RUF012, never written
    class_slot: bool | None = None
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    said: tuple[str, ...] = ()


def beside(path: str, layout: Layout, found: Mapping[str, Shape]) -> Beside:
    """What the JSON files in a file's folder say of it, whose leaves have the shapes `found`."""
    config = _json(Path(path).with_name("config.json"))
    of_timm = "architecture" in config or "pretrained_cfg" in config
    if not of_timm and not _OF_TRANSFORMERS & config.keys():
        config = {}
    if layout.name == "huggingface_siglip" and isinstance(config.get("vision_config"), dict):
        config = config["vision_config"]
    arguments = _dict(config.get("model_args")) if of_timm else config
    if config and (other := _another(config, arguments, of_timm, layout, found)):
        return Beside(said=(f"config.json beside it left alone: it is of another model ({other})",))
    return _of_timm(path, config, arguments, found) if of_timm else _of_transformers(path, config, layout, found)


def _another(
    config: Mapping[str, Any], arguments: Mapping[str, Any], of_timm: bool, layout: Layout, found: Mapping[str, Shape]
) -> str:
    """By what one knows that a config.json is another model's; empty if it may be this one's."""
    if of_timm != (layout.name == "timm"):
        return f"{'timm' if of_timm else 'transformers'}'s, the file has {layout.name}'s names"
    kind = config.get("model_type")
    if not of_timm and kind is not None and not re.fullmatch(_MODEL_TYPES.get(layout.name, ""), str(kind)):
        return f"model_type {kind!r}, the file has {layout.name}'s names"
    own = _sizes(found)
    for field, theirs in _SIZES.items():
        for name in theirs:
            if (value := arguments.get(name)) is not None and field in own and value != own[field]:
                return f"{name} {value}, the file has {own[field]}"
    seen = {
        "class_token": "cls" in found,
        "qkv_bias": any(path.endswith("/query/bias") for path in found),
        "mlp_ratio": own["mlp_dim"] / own["hidden_size"] if own else None,
    }
    for name, value in seen.items():
        if arguments.get(name) is not None and value is not None and arguments[name] != value:
            return f"{name} {arguments[name]}, the file has {value}"
    return ""


def _sizes(found: Mapping[str, Shape]) -> dict[str, int]:
    kernel = found.get("embedding/kernel", ())
    outputs = found.get("Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel", ())
    if "conv_root/kernel" in found or len(kernel) != 4 or len(outputs) != 2:
        return {}
    return {
        "patch_size": kernel[0],
        "channels": kernel[2],
        "hidden_size": kernel[3],
        "mlp_dim": outputs[1],
        "num_layers": depth(found),
    }


def _of_transformers(path: str, config: Mapping[str, Any], layout: Layout, found: Mapping[str, Shape]) -> Beside:
    fields = {ours: config[theirs] for theirs, ours in _TRANSFORMERS.items() if config.get(theirs) is not None}
    if config.get("hidden_act") is not None:
        fields["gelu"] = _gelu(path, "hidden_act", config["hidden_act"])
    if "pre_logits/kernel" in found and config.get("pooler_act", "tanh") != "tanh":
        raise InputError(f"{path}: config.json beside it has pooler_act {config['pooler_act']!r}, expected tanh")
    fields, said = _fitting(fields, found)
    names, more = _class_names(config.get("id2label"), found)
    processor = _json(Path(path).with_name("preprocessor_config.json"))
    if not processor:
        processor = _dict(_json(Path(path).with_name("processor_config.json")).get("image_processor"))
    stated = Stated({}, None, ())
    if processor and layout.name.startswith("huggingface"):
        stated = preprocessing.of_transformers(processor, _image_hw(fields, found))
    lines = tuple(f"preprocessor_config.json: {line}" for line in stated.said)
    return Beside(fields | stated.fields, None, names, stated.preprocessing, (*said, *more, *lines))


def _of_timm(path: str, config: Mapping[str, Any], arguments: Mapping[str, Any], found: Mapping[str, Shape]) -> Beside:
    cfg, architecture = _dict(config.get("pretrained_cfg", config)), str(config.get("architecture", ""))
    if unknown := [name for name, value in arguments.items() if value and not _SHOWN.fullmatch(name)]:
        raise InputError(
            f"{path}: config.json beside it has {unknown[0]}={arguments[unknown[0]]!r}, which vitfn does not follow"
        )
    fields: dict[str, Any] = {}
    for pattern, known in _ARCHITECTURES.items():
        fields |= known if re.fullmatch(pattern, architecture) else {}
    if arguments.get("num_heads") is not None:
        fields["num_heads"] = arguments["num_heads"]
    if arguments.get("act_layer") is not None:
        fields["gelu"] = _gelu(path, "act_layer", arguments["act_layer"])
    has = pooling(found)
    pool = arguments.get("global_pool", config.get("global_pool"))
    if pool and _POOLS.get(pool) != has:
        what = {"token": "a class token", "map": "an attention head", "gap": "neither class token nor attention head"}
        stated = f"config.json beside it has global_pool={pool!r} for a model with {what[has]}"
        raise InputError(f"{path}: {stated}, which vitfn does not compute")
    slot = arguments.get("no_embed_class", re.fullmatch(_SLOTLESS, architecture) is not None or None)
    said: tuple[str, ...] = ()
    if arguments.get("img_size") is not None:
        fields["image_size"] = arguments["img_size"]
    elif isinstance(size := cfg.get("input_size"), list) and len(size) == 3 and size[1:]:
        if _fits(size[1:], found):
            fields["image_size"] = size[1:]
        else:  # of the first weights, not of these
            said += (f"config.json: input_size {size} not followed: the file's positions are of another",)
    fields, more = _fitting(fields, found)
    classes, stated = (found.get("head/bias") or (0,))[0], arguments.get("num_classes", config.get("num_classes"))
    if stated not in (None, classes):
        said += (f"config.json: num_classes {stated} not followed: the head has {classes} classes",)
    names, others = _class_names(config.get("label_names", cfg.get("label_names")), found)
    images = preprocessing.of_timm(cfg)
    lines = tuple(f"config.json: {line}" for line in images.said)
    return Beside(
        fields | images.fields,
        None if slot is None else not slot,
        names,
        images.preprocessing,
        (*said, *more, *others, *lines),
    )


def _image_hw(fields: Mapping[str, Any], found: Mapping[str, Shape]) -> tuple[int, int]:
    """The image size that is stated, or that of a square grid of the file's patches."""
    if (size := fields.get("image_size")) is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return height, width
    patch, tokens = _sizes(found).get("patch_size", 1), found[POSITIONS][1]
    side = int(tokens**0.5) * patch
    return side, side


def _fits(size: Any, found: Mapping[str, Shape]) -> bool:
    """Whether positions are there for the patches of an image, with or without one for a class token."""
    patch = _sizes(found).get("patch_size")
    if not patch:
        return True
    patches = (size[0] // patch) * (size[1] // patch)
    return found[POSITIONS][1] - patches in (0, 1)


def _fitting(fields: dict[str, Any], found: Mapping[str, Shape]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields, of whose image size the part of a patch is left out, as a strided convolution does."""
    size, patch = fields.get("image_size"), _sizes(found).get("patch_size")
    if size is None or not patch:
        return fields, ()
    sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side >= patch for side in sides):
        return fields, ()  # ViTConfig refuses it
    whole = tuple(side - side % patch for side in sides)
    fields = fields | {"image_size": whole[0] if whole[0] == whole[1] else whole}
    if list(whole) == sides:
        return fields, ()
    found_px, taken = ("x".join(map(str, pair)) for pair in (sides, whole))
    return fields, (f"config.json: image size {found_px} px taken as {taken}: the patches of {patch} px cover that",)


def _gelu(path: str, key: str, value: Any) -> str:
    if str(value) not in _GELU:
        raise InputError(f"{path}: config.json beside it has {key} {value!r}, expected one of {', '.join(_GELU)}")
    return _GELU[str(value)]


def _class_names(stated: Any, found: Mapping[str, Shape]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The classes' names, by a list or by their numbers from 0 or 1, and a line if they are not the head's."""
    (classes,) = found.get("head/bias", ()) or (0,)
    if not stated or not classes:
        return None, ()
    numbered: dict[Any, Any] = dict(enumerate(stated)) if isinstance(stated, list) else _dict(stated)
    try:
        order = sorted(numbered, key=int)
        first = int(order[0])
        consecutive = first in (0, 1) and [int(key) for key in order] == list(range(first, first + classes))
    except (TypeError, ValueError, IndexError):
        consecutive = False
    if not consecutive:
        return None, (f"config.json: its {len(numbered)} class names not followed: the head has {classes} classes",)
    return tuple(str(numbered[key]) for key in order), ()


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return _dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}
