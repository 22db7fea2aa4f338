"""The forward pass as a step runs it: under autocast, one block compiled, parts recomputed, sharded leaves gathered."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitfn import arguments, layers, tree, vit
from vitfn.compile import compiled
from vitfn.config import ViTConfig
from vitfn.device import Device
from vitfn.errors import InputError
from vitfn.gathering import lent
from vitfn.meshes import Cuts, Mesh
from vitfn.remat import KINDS as REMATS
from vitfn.remat import recomputed
from vitfn.tree import Tree
from vitfn.vit import forward, shapes

Classify = Callable[[Tree, Tensor], Tensor]  # the head's parameters and features (B, D or R) -> logits, or their losses
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(precision: str, compile: str, sharded: Cuts, remat: str = "none") -> None:
    """Raises InputError for what there is none of, and for what one graph cannot do."""
    if precision not in PRECISIONS:
        raise InputError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if remat not in REMATS:
        raise InputError(f"remat: found {remat!r}, expected one of {', '.join(REMATS)}")
    if sharded and compile == "step":
        raise InputError("compile=step: one graph cannot gather sharded parameters; expected block or off")
    if remat != "none" and compile == "step":
        raise InputError(f"compile=step: one graph by torch.func cannot do remat={remat}; expected block or off")


def check_input(config: ViTConfig, precision: str, params: Any, batch: tuple[Any, ...]) -> None:
    """Raises InputError for what is not the config's parameters, or a batch (images,) or (images, labels) for them."""
    images, *labels = batch
    vit.check(params, images, config)
    if PRECISIONS[precision] is None and images.dtype not in {leaf.dtype for leaf in tree.leaves(params)}:
        raise InputError(arguments.mixed_dtypes(params, images))
    for found in labels:
        arguments.check_labels(found, len(images))


def _attention_recomputing_block(params, x, config, keys, taps, fused, branches, pooled):
    return layers.block(params, x, config, keys, taps, fused, branches, pooled, recomputed(layers.attended))


_BLOCKS: dict[str, Callable[..., Tensor]] = {
    "none": layers.block,
    "attention": _attention_recomputing_block,
    "block": recomputed(layers.block),
}


def _make_block(form: str, row: Device, remat: str) -> Callable[..., Tensor]:
    """The encoder block of all layers. That of the class token alone is never compiled: it is little work."""
    if form != "block":
        return _BLOCKS[remat]
    all_tokens = compiled(_BLOCKS[remat], row)

    def block(params: Tree, x: Tensor, *rest: Any) -> Tensor:
        pooled = rest[-1]
        return (layers.block if pooled else all_tokens)(params, x, *rest)

    return block


def make_logits(
    config: ViTConfig, precision: str, form: str, row: Device, mesh: Mesh, remat: str = "none"
) -> Callable[..., Tensor]:
    """`logits(params, images, keys=None, classify=...)`: (B, C, H, W) -> (B, K), float32 after autocast.

    One compiled block serves all layers where `form` is 'block'. Of parameters that the mesh cuts it takes the parts.
    `classify` is `vit.forward`'s.
    """
    dtype, cuts = PRECISIONS[precision], mesh.cuts(shapes(config), "sharded")
    block = _make_block(form, row, remat)

    def logits(params: Tree, images: Tensor, keys: Tensor | None = None, classify: Classify = layers.dense) -> Tensor:
        if dtype is None:
            return forward(params, images, config, keys, block=block, classify=classify, fused=True)
        with torch.autocast(row.name, dtype):
            return forward(params, images, config, keys, block=block, classify=classify, fused=True).float()

    def gathering_logits(params: Tree, *arguments: Any) -> Tensor:
        with lent(params, cuts, mesh, dtype, row.overlaps) as whole:
            return logits(whole, *arguments)

    return gathering_logits if cuts else logits
