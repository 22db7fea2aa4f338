"""Google's layouts: the original names of 2020, flax.linen's, and big_vision's, of every generation."""

import re

from torch import Tensor

from vitfn.config import ViTConfig
from vitfn.layout import Layout, Shape

POSITIONS = "Transformer/posembed_input/pos_embedding"
_GROUP_NORM = re.compile(r"(.*/)?gn[^/]*/(scale|bias)")
_DEEPEST = 1000  # layers; an array with more of them is no model's

# flax.linen numbers a block's layers by class, the 2020 files across classes.
_TO_ORIGINAL = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
_TO_LINEN = {original: linen for linen, original in _TO_ORIGINAL.items()}


def _in_block(path: str) -> bool:
    return path.startswith("Transformer/encoderblock")


def _renamed(path: str, names: dict[str, str]) -> str:
    return "/".join(names.get(part, part) for part in path.split("/")) if _in_block(path) else path


def _paths(name: str, shape: Shape) -> tuple[str, ...]:
    """Every generation at once, repaired as big_vision's fix_old_checkpoints does."""
    if name in ("pos_embedding", "Transformer/pos_embedding"):
        return (POSITIONS,)
    if scanned := re.fullmatch(r"Transformer/encoderblock/(.*)", name):
        depth = shape[0] if shape and shape[0] <= _DEEPEST else 0
        return tuple(_renamed(f"Transformer/encoderblock_{i}/{scanned[1]}", _TO_ORIGINAL) for i in range(depth))
    # The attention head's layers once lay at the root.
    if head := re.fullmatch(
        r"(?:MAPHead_0/)?(?:(probe)|(MultiHeadDotProductAttention|LayerNorm|MlpBlock)_\d+(/.*))", name
    ):
        return (f"MAPHead_0/{head[1] or f'{head[2]}_0{head[3]}'}",)
    return (_renamed(name, _TO_ORIGINAL),)


def _part(path: str, shape: Shape, parts: int) -> Shape:
    """Group normalisation is (1, 1, 1, C) in files from before flax 0.3.6."""
    return shape[3:] if _GROUP_NORM.fullmatch(path) and shape[:3] == (1, 1, 1) else shape


def _layer(path: str, shape: Shape, parts: int) -> Shape:
    return shape[1:] if _in_block(path) else shape


def _store_original(path: str, leaf: Tensor) -> Tensor:
    return leaf[None, None, None] if _GROUP_NORM.fullmatch(path) else leaf


def _store_layer(path: str, leaf: Tensor) -> Tensor:
    return leaf[None] if _in_block(path) else leaf


def _linen(path: str, config: ViTConfig) -> str:
    return _renamed(path, _TO_LINEN)


def _big_vision(path: str, config: ViTConfig) -> str:
    return "pos_embedding" if path == POSITIONS else _linen(path, config)


def _scan(path: str, config: ViTConfig) -> str:
    return re.sub(r"/encoderblock_\d+/", "/encoderblock/", _big_vision(path, config))


ORIGINAL = Layout(
    name="original",
    anchor=r"((?:.*/)?)embedding/kernel",
    paths=_paths,
    own=lambda path, config: path,
    part=_part,
    store=_store_original,
    restore=lambda path, part: part,
)
LINEN = ORIGINAL._replace(name="linen", own=_linen, store=lambda path, leaf: leaf)
BIG_VISION = LINEN._replace(name="big_vision", own=_big_vision, prefix="params/")
BIG_VISION_SCAN = BIG_VISION._replace(name="big_vision_scan", own=_scan, part=_layer, store=_store_layer)
LAYOUTS = (ORIGINAL, LINEN, BIG_VISION, BIG_VISION_SCAN)


def which(names: set[str]) -> Layout:
    """The generation of a file's names, which are given without their prefix."""
    if any(name.startswith("Transformer/encoderblock/") for name in names):
        return BIG_VISION_SCAN
    if any(name.startswith("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/") for name in names):
        return ORIGINAL
    return LINEN if POSITIONS in names else BIG_VISION
