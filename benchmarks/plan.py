"""What a training step needs of each device, from the config alone: PYTHONPATH=. python benchmarks/plan.py

It prints the tables of docs/scaling.md, which explains the model. Sizes are bytes of one rank; nothing is allocated.
"""

import functools
import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

from vitfn import get_config, meshes, tree, vit
from vitfn.config import ViTConfig

MODELS = ("B/16", "L/16", "H/14", "g/14", "G/14")
STATE = {"SGD": 1, "AdamW": 2}  # numbers an optimizer keeps for each parameter
COPIES = {"SGD": 3, "AdamW": 4}  # of gradients at the update's peak: summed, clipped, and the optimizer's own
DEVICES = {16: (4, 32), 80: (8, 32)}  # GB (10^9 bytes) of a device: ranks of a card or machine, and of several
USABLE = 0.9  # of a device: the rest is the driver's, the collectives' buffers and the allocator's gaps
LARGEST = 1024  # images a device, where the search for a batch ends
FLOAT, HALF = 4, 2


class Memory(NamedTuple):
    """What one rank holds, in bytes: `peak` is the most at once, the others are its parts, not all at the same time."""

    params: int
    state: int
    gradients: int  # with the copies of them that sums, clipping and update make
    gathered: int  # of sharded parameters: whole blocks and their gradients in passing
    activations: int  # kept at the end of forward; with recompute, in backward's first block
    peak: int


@functools.cache
def parameter_bytes(config: ViTConfig, pattern: str = ".*") -> int:
    """Of the float32 leaves whose whole path matches."""
    return FLOAT * sum(map(math.prod, tree.select(vit.shapes(config), pattern).values()))


def block_bytes(config: ViTConfig, leaves: str = "") -> int:
    """Of the float32 leaves of one encoder block, or those of them whose path ends so."""
    return parameter_bytes(config, f"Transformer/encoderblock_0/.*{leaves}")


@functools.cache
def cut_bytes(config: ViTConfig, ranks: int) -> int:
    """Of the float32 leaves, whole, that so many ranks divide: those that vitfn.meshes cuts."""
    shapes, grid = vit.shapes(config), SimpleNamespace(size=lambda dim: ranks)
    cuts = meshes.Mesh(grid=grid, rules=meshes.rules("sharded")).cuts(shapes, "sharded")
    return FLOAT * sum(math.prod(shapes[path]) for path in cuts)


def share_bytes(config: ViTConfig, ranks: int) -> int:
    """Parameters of one of `ranks` that share them: its parts of what is cut, and what is not."""
    cut = cut_bytes(config, ranks)
    return parameter_bytes(config) - cut + cut // ranks


def block_activations(config: ViTConfig, batch: int, half: bool) -> int:
    """What autograd keeps of one encoder block with fused attention, beside its input, for a batch of images.

    Numbers of each token: the second norm's input (D), the norms' outputs (2 D), means and deviations (4), query, key,
    value and attention's output (4 D) with the logsumexp (H), the GELU's input and output (2 M). Under autocast the
    residual stream is float32, and query, key and value each keep a copy of the first norm's output (2 D more).
    """
    D, M, H = config.hidden_size, config.mlp_dim, config.num_heads
    size = D * FLOAT + (8 * D + 2 * M) * HALF if half else (7 * D + 2 * M) * FLOAT
    return batch * config.num_tokens * (size + (4 + H) * FLOAT)


def patch_activations(config: ViTConfig, batch: int, half: bool) -> int:
    """The patches of a batch of images, which the embedding's gradient needs at the end of backward."""
    return batch * math.prod(config.grid) * config.patch_size**2 * config.channels * (HALF if half else FLOAT)


def activations(config: ViTConfig, batch: int, half: bool, recompute: bool) -> int:
    """What autograd keeps of a batch; with `recompute` each block's input, and all of the one block in backward.

    For class-token pooling without pre_logits, stem and dropout; half-precision copies of kernels not counted.
    """
    N, D = config.num_tokens, config.hidden_size
    inputs = (config.num_layers + 1) * batch * N * D * FLOAT  # of blocks and of the encoder's norm
    pooled = batch * (D * HALF if half else N * D * FLOAT)  # float32 keeps all tokens for the one that is pooled
    blocks = (1 if recompute else config.num_layers) * block_activations(config, batch, half)
    return patch_activations(config, batch, half) + inputs + blocks + pooled + batch * config.num_classes * FLOAT


def kernel_copies(config: ViTConfig, recompute: bool) -> int:
    """Half-precision copies of kernels that products keep for backward under autocast; of one block if recomputed."""
    return block_bytes(config, "kernel") * HALF // FLOAT * (1 if recompute else config.num_layers)


def gathered_bytes(config: ViTConfig, half: bool, overlaps: bool = True) -> int:
    """Of sharded parameters at once: a block, with `overlaps` the next one on its way, the block's gradients, and
    those of the block before, which are being summed in float32. Autocast's kernels are gathered in half precision.
    """
    kernels = block_bytes(config, "kernel")
    return (3 if overlaps else 2) * (kernels * HALF // FLOAT if half else kernels) + kernels


def gradient_bytes(config: ViTConfig, placement: str, ranks: int) -> int:
    """Gradients after backward with their sums over the ranks, which begin while it computes."""
    whole, share = parameter_bytes(config), share_bytes(config, ranks)
    return {"replicated": whole + whole * (ranks > 1), "optimizer": whole + share, "sharded": share}[placement]


def backward_bytes(
    config: ViTConfig, batch: int, half: bool, recompute: bool, placement: str = "replicated", ranks: int = 1
) -> int:
    """The most that forward and backward hold at once beside parameters, state, images and what is gathered.

    It is in backward's first block, where all activations are still there, or in its last, where most gradients are.
    """
    kept, block = activations(config, batch, half, recompute), block_activations(config, batch, half)
    hidden = batch * config.num_tokens * config.mlp_dim * (HALF if half else FLOAT)  # gradient of the MLP's inner layer
    gradients = gradient_bytes(config, placement, ranks) * (config.num_layers - 1) // config.num_layers
    last = block + patch_activations(config, batch, half) + gradients
    if placement == "sharded":
        return max(kept, last) + hidden
    hidden += FLOAT * config.hidden_size * config.mlp_dim  # and of the kernel after it
    if not half:
        return max(kept, last) + hidden
    # autocast's cache keeps copies of the MLPs' kernels to the end of forward, though recompute does not need them
    cache = config.num_layers * block_bytes(config, "Dense_./kernel") * HALF // FLOAT if recompute else 0
    forward = kept - block + cache + hidden  # and the last block's MLP
    return max(kept + kernel_copies(config, recompute), last + kernel_copies(config, True), forward) + hidden


def memory(
    config: ViTConfig,
    batch: int,
    *,
    optimizer: str = "SGD",
    half: bool = False,
    recompute: bool = False,
    placement: str = "replicated",
    ranks: int = 1,
    overlaps: bool = True,
) -> Memory:
    """Of one of `ranks` that divide a model, or each have one if replicated; its share of the batch is `batch`."""
    sharded, whole, share = placement == "sharded", parameter_bytes(config), share_bytes(config, ranks)
    params, updated = share if sharded else whole, whole if placement == "replicated" else share
    gradients = max(gradient_bytes(config, placement, ranks), COPIES[optimizer] * updated)
    gathered = gathered_bytes(config, half, overlaps) if sharded else 0
    kept = activations(config, batch, half, recompute)
    kept += kernel_copies(config, recompute) if half and not sharded else 0
    images = batch * config.channels * math.prod(config.image_hw) * FLOAT
    backward = backward_bytes(config, batch, half, recompute, placement, ranks) + gathered
    peak = params + STATE[optimizer] * updated + images + max(backward, gradients)
    return Memory(params, STATE[optimizer] * updated, gradients, gathered, kept, peak)


def sent_bytes(config: ViTConfig, placement: str, ranks: int, half: bool = False, copies: int = 1) -> int:
    """What one rank sends in a step, by rings; `copies` groups of `ranks` that divide a model add up what they have.

    Sums are in float32. Sharded kernels are gathered twice, for forward and for backward, in autocast's precision.
    """
    cut = 0 if placement == "replicated" else cut_bytes(config, ranks)
    gathers = 0 if not cut else 1 if placement == "optimizer" else 2 * HALF / FLOAT if half else 2
    everybody = ranks * copies
    within = (1 + gathers) * cut * (ranks - 1) / ranks
    between = 2 * cut / ranks * (copies - 1) / copies
    return round(within + between + 2 * (parameter_bytes(config) - cut) * (everybody - 1) / everybody)


def largest_batch(config: ViTConfig, device: int, **how) -> int:
    """The largest power of two of images that a device of so many GB can train on, up to LARGEST; 0 if not even one."""
    sizes = [2**i for i in range(LARGEST.bit_length())]
    return max((size for size in sizes if memory(config, size, **how).peak <= USABLE * device * 1e9), default=0)


def table(title: str, head: tuple[str, ...], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells)


def gigabytes(*sizes: float) -> str:
    """Sizes in GB, once if they are the same."""
    return " / ".join(dict.fromkeys(f"{size / 1e9:.3g}" for size in sizes))


def tables() -> str:
    """The tables of docs/scaling.md."""
    configs, both, found, rows = {name: get_config(name, dropout_rate=0) for name in MODELS}, (False, True), [], []
    for name, config in configs.items():
        size = parameter_bytes(config)
        sizes = [gigabytes(part) for part in (size, STATE["AdamW"] * size, block_bytes(config))]
        kept = [" / ".join(f"{activations(config, 1, half, r) / 1e6:.0f}" for r in both) for half in both]
        copies = gigabytes(*(kernel_copies(config, recompute) for recompute in both))
        rows.append([name, f"{size / FLOAT / 1e6:.1f}", *sizes, *kept, copies])
    title = "A model on one device, in GB. Where two numbers stand: as it is / with recompute."
    images = ("an image, float32, MB", "an image, half, MB", "kernels in half")
    head = ("model", "parameters, 10^6", "parameters, momentum", "AdamW's state", "one block", *images)
    found.append(table(title, head, rows))
    for device, (ranks, _) in DEVICES.items():
        rows = []
        for name, config in configs.items():
            for placement in meshes.KINDS:
                sgd, adamw = (memory(config, 1, optimizer=o, placement=placement, ranks=ranks) for o in STATE)
                pairs = [gigabytes(a, b) for a, b in zip(sgd[1:3], adamw[1:3], strict=True)]
                gathered = gigabytes(*(gathered_bytes(config, half) if sgd.gathered else 0 for half in both))
                sent = gigabytes(*(sent_bytes(config, placement, ranks, half) for half in both))
                rows.append([name, placement, gigabytes(sgd.params), *pairs, gathered, sent])
        title = f"Each of {ranks} ranks, for devices of {device} GB, in GB."
        head = ("parameters", "state, SGD / AdamW", "gradients and copies, SGD / AdamW")
        head = ("model", "placement", *head, "gathered, float32 / half", "sent in a step, float32 / half")
        found.append(table(title, head, rows))
    for device, (ranks, many) in DEVICES.items():
        where, rows = [("replicated", 1), *((kind, ranks) for kind in meshes.KINDS), ("sharded", many)], []
        for name, config in configs.items():
            alike: dict[tuple[str, ...], list[str]] = {}
            for optimizer, half in itertools.product(STATE, both):
                fits = functools.partial(largest_batch, config, device, optimizer=optimizer, half=half)
                cells = (" / ".join(str(fits(placement=p, ranks=n, recompute=r)) for r in both) for p, n in where)
                alike.setdefault(tuple(cells), []).append(f"{optimizer} {'half' if half else 'float32'}")
            rows += [[name, ", ".join(how), *cells] for cells, how in alike.items()]
        title = f"Largest batch on a device of {device} GB: as it is / with recompute. 0: not even one image."
        head = ("model", "", "one device", *(f"{placement}, {n} ranks" for placement, n in where[1:]))
        found.append(table(title, head, rows))
    return "\n\n".join(found)


if __name__ == "__main__":
    print(tables())
