"""What a training step needs of a device's memory, from the config alone: sizes are bytes, and nothing is allocated.

docs/scaling.md explains the model and says what it was checked against. B images, N tokens, D hidden size, M the MLP's
width, H heads.
"""

import functools
import math
from typing import NamedTuple

from vitfn import tree, vit
from vitfn.config import ViTConfig
from vitfn.meshes import ONE, Mesh

STATE = {"sgd": 1, "adamw": 2}  # numbers that an optimizer keeps for each parameter
_PASSING = {"sgd": 3, "adamw": 5}  # and makes in passing, weight decay included, of
_AT_ONCE = 16  # leaves at a time (vitfn.optim)
_FLOAT, _HALF = 4, 2
USABLE = 0.9  # of a device: the rest is the driver's, the collectives' buffers and the allocator's gaps


class Memory(NamedTuple):
    """What one rank holds, in bytes: `peak` is the most at once, the others are its parts, not all at the same time."""

    params: int
    state: int
    gradients: int  # with their sums, or with what the update makes in passing
    gathered: int  # of sharded parameters: whole blocks and their gradients in passing
    activations: int  # kept at the end of forward, or in backward with the first block that is computed again
    peak: int


@functools.cache
def parameter_bytes(config: ViTConfig, pattern: str = ".*") -> int:
    """Of the float32 leaves whose whole path matches."""
    return _FLOAT * sum(map(math.prod, tree.select(vit.shapes(config), pattern).values()))


def block_bytes(config: ViTConfig, leaves: str = "") -> int:
    """Of the float32 leaves of one encoder block, or those of them whose path ends so."""
    return parameter_bytes(config, f"Transformer/encoderblock_0/.*{leaves}")


@functools.cache
def cut_bytes(config: ViTConfig, mesh: Mesh, kind: str) -> int:
    """Of the float32 leaves, whole, that a mesh cuts: 'sharded', or for the 'optimizer' alone."""
    shapes = vit.shapes(config)
    return _FLOAT * sum(math.prod(shapes[path]) for path in mesh.cuts(shapes, kind))


@functools.cache
def together_bytes(config: ViTConfig) -> int:
    """Of the float32 leaves that an update works on at a time, the most of them."""
    sizes = [_FLOAT * math.prod(shape) for shape in vit.shapes(config).values()]
    return max(sum(sizes[i : i + _AT_ONCE]) for i in range(0, len(sizes), _AT_ONCE))


def attention_activations(config: ViTConfig, batch: int, half: bool) -> int:
    """What autograd keeps of a block's attention with its norm, beside its input, where attention is fused.

    The norm's output, its means and deviations, query, key, value, output and logsumexp. Under autocast query, key and
    value each keep a copy of the norm's output.
    """
    D, N, H = config.hidden_size, config.num_tokens, config.num_heads
    return batch * N * ((7 * D * _HALF if half else 5 * D * _FLOAT) + (2 + H) * _FLOAT)


def pooling_activations(config: ViTConfig, batch: int, half: bool) -> int:
    """What autograd keeps of the attention of one query an image, with the norm before it, beside that one's input.

    The norm's output, its means and deviations, query and output, of each head what it asks and sees, the weights, and
    copies of the key's and value's kernels. Under autocast either product with the tokens keeps a copy of them; its
    copies of kernels are `kernel_copies`.
    """
    D, N, H = config.hidden_size, config.num_tokens, config.num_heads
    numbers = (2 * N + 2 * H + 3) * D + H * N if half else (N + 2 * H + 2) * D
    copies = 0 if half else 2 * D * D * _FLOAT
    return copies + batch * (numbers * (_HALF if half else _FLOAT) + (2 + H) * N * _FLOAT)


def mlp_activations(config: ViTConfig, batch: int, half: bool, tokens: int | None = None) -> int:
    """Of the rest of a block: the second norm's input, which autocast leaves in float32, output, means and deviations,
    and the GELU's input and output; with dropout the masks, a byte a number.
    """
    D, M = config.hidden_size, config.mlp_dim
    numbers = D * _FLOAT + (D + 2 * M) * (_HALF if half else _FLOAT) + 2 * _FLOAT
    masks = (2 * D + M) * (config.dropout_rate > 0)
    return batch * (tokens or config.num_tokens) * (numbers + masks)


def patch_activations(config: ViTConfig, batch: int, half: bool) -> int:
    """The patches of a batch of images, which the embedding's gradient needs at the end of backward."""
    return batch * math.prod(config.grid) * config.patch_size**2 * config.channels * (_HALF if half else _FLOAT)


def of_a_block(config: ViTConfig, batch: int, half: bool, remat: str) -> tuple[int, int]:
    """What a block of all tokens keeps, beside its input, and what of it is there while backward is in it."""
    attention, mlp = (of(config, batch, half) for of in (attention_activations, mlp_activations))
    return {
        "none": (attention + mlp, attention + mlp),
        "attention": (mlp, max(attention, mlp)),  # the MLP's backward is done when attention is computed again
        "block": (0, attention + mlp),
    }[remat]


def kept(config: ViTConfig, batch: int, half: bool, remat: str = "none") -> tuple[int, int]:
    """What autograd keeps of a batch at the end of forward, and in backward in the last block that computes all tokens.

    For models without stem (a hybrid's is ignored), pre_logits, attention dropout and frozen leaves; half-precision
    copies of kernels are not counted. With class-token pooling the last block is of that token alone.
    """
    D, N, token = config.hidden_size, config.num_tokens, config.classifier == "token"
    each, at_work = of_a_block(config, batch, half, remat)
    blocks = config.num_layers - token
    stream = blocks * (batch * N * D * _FLOAT + each)  # with the blocks' inputs
    stream += patch_activations(config, batch, half) + batch * N * D * (config.dropout_rate > 0)  # a mask
    last = batch * (N + token) * D * _FLOAT  # what the last norm gets, and with a class token the last block
    if config.classifier == "gap":
        pooled = batch * D * (_HALF if half else _FLOAT)
    else:
        pooled = pooling_activations(config, batch, half) + mlp_activations(config, batch, half, 1)
    return stream + last + pooled + batch * config.num_classes * _FLOAT, stream - each + at_work


def activations(config: ViTConfig, batch: int, half: bool, remat: str = "none") -> int:
    """The larger of what is `kept` at the end of forward and in backward."""
    return max(kept(config, batch, half, remat))


def kernel_copies(config: ViTConfig, remat: str = "none") -> int:
    """Half-precision copies of kernels that products keep for backward under autocast; of one block if recomputed."""
    mlp = block_bytes(config, "Dense_./kernel")
    attention = block_bytes(config, "kernel") - mlp
    many, one = config.num_layers, 1
    blocks = {"none": (many, many), "attention": (one, many), "block": (one, one)}[remat]
    return (blocks[0] * attention + blocks[1] * mlp) * _HALF // _FLOAT


def gathered_bytes(config: ViTConfig, half: bool, overlaps: bool = True) -> int:
    """Of sharded parameters at once: a block, with `overlaps` the next one on its way, the block's gradients, and
    those of the block before, which are being summed in float32. Autocast's kernels are gathered in half precision.
    """
    kernels = block_bytes(config, "kernel")
    return (3 if overlaps else 2) * (kernels * _HALF // _FLOAT if half else kernels) + kernels


def backward_bytes(
    config: ViTConfig,
    batch: int,
    half: bool,
    remat: str = "none",
    *,
    gradients: int,
    parts: int = 1,
    sharded: bool = False,
) -> int:
    """The most that forward and backward of one of `parts` hold at once beside parameters, state, images and what is
    gathered; `gradients` are all there are after backward.

    It is in backward's first block, where all activations are still there, in its last, where most gradients are, or
    after it. Those of earlier parts are there from the start.
    """
    head, block = parameter_bytes(config, "head/.*"), block_bytes(config) * (config.classifier == "token")
    if sharded:
        head = block = 0  # they are among what is gathered
    forward, backward = kept(config, batch, half, remat)
    if parts == 1:
        first = max(forward + head, backward + head + block)
        last = gradients * (config.num_layers - 1) // config.num_layers
    else:
        first, last = max(forward, backward) + gradients, gradients
    end = patch_activations(config, batch, half) + batch * config.num_tokens * config.hidden_size * _FLOAT
    last += end + of_a_block(config, batch, half, remat)[1]
    hidden = batch * config.num_tokens * config.mlp_dim * (_HALF if half else _FLOAT)  # gradient of the MLP's inside
    if not sharded:
        hidden += _FLOAT * config.hidden_size * config.mlp_dim  # and of the kernel after it
        if half:
            first, last = first + kernel_copies(config, remat), last + kernel_copies(config, "block")
    return max(first + hidden, last + hidden, gradients + end)


def memory(
    config: ViTConfig,
    batch: int,
    *,
    optimizer: str = "sgd",
    half: bool = False,
    remat: str = "none",
    parts: int = 1,
    average: bool = False,
    mesh: Mesh = ONE,
    overlaps: bool = True,
) -> Memory:
    """Of one rank of a mesh, which computes `batch` images at a time, in so many `parts` of its share.

    `optimizer` is sgd or adamw, `half` says whether autocast is on, `average` whether one of the weights is kept.
    """
    whole, ranks = parameter_bytes(config), mesh.ranks.count
    sharded, split = (cut_bytes(config, mesh, kind) for kind in ("sharded", "optimizer"))
    params = whole - sharded + sharded // mesh.shards
    updated = params - split + split // mesh.shards
    sums = updated - sharded // mesh.shards * (mesh.copies == 1) if ranks > 1 else 0  # over all, or the copies
    passing = _PASSING[optimizer] * together_bytes(config) * updated // whole
    gradients = max(params + sums, updated + passing)
    state = (STATE[optimizer] + average) * updated
    gathered = gathered_bytes(config, half, overlaps) if sharded else 0
    kept = activations(config, batch, half, remat)
    kept += kernel_copies(config, remat) if half and not sharded else 0
    images = parts * batch * config.channels * math.prod(config.image_hw) * _FLOAT
    backward = backward_bytes(config, batch, half, remat, gradients=params + sums, parts=parts, sharded=bool(sharded))
    return Memory(
        params, state, gradients, gathered, kept, params + state + images + max(backward + gathered, gradients)
    )
