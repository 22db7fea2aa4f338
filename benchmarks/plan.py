"""The tables of docs/scaling.md, which explains them: PYTHONPATH=. python benchmarks/plan.py

vitfn/plan.py has the model of memory; here are what is sent, and the largest batch. Nothing is allocated.
"""

import functools
import itertools
from typing import NamedTuple

from vitfn import get_config, meshes, plan
from vitfn.config import ViTConfig
from vitfn.parallel import Ranks
from vitfn.remat import KINDS

MODELS = ("B/16", "L/16", "H/14", "g/14", "G/14")
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
DEVICES = {16: (4, 32), 80: (8, 32)}  # GB (10^9 bytes) of a device: ranks of a card or machine, and of several
LARGEST = 1024  # images a device, where the search for a batch ends


class Grid(NamedTuple):
    """As much of a DeviceMesh as tells how many ranks share a model."""

    ranks: int

    def size(self, dim: int) -> int:
        return self.ranks


@functools.cache
def mesh(placement: str, ranks: int, copies: int = 1) -> meshes.Mesh:
    """Copies of a model, each of so many ranks, that nobody has joined."""
    return meshes.Mesh(Ranks(count=ranks * copies), grid=Grid(ranks), rules=meshes.rules(placement))


def sent_bytes(config: ViTConfig, placement: str, ranks: int, half: bool = False, copies: int = 1) -> int:
    """What one rank sends in a step, by rings; `copies` groups of `ranks` that divide a model add up what they have.

    Sums are in float32. Sharded kernels are gathered twice, for forward and for backward, in autocast's precision.
    """
    cut = 0 if placement == "replicated" else plan.cut_bytes(config, mesh(placement, ranks), placement)
    gathers = 0 if not cut else 1 if placement == "optimizer" else 1 if half else 2
    everybody = ranks * copies
    within = (1 + gathers) * cut * (ranks - 1) / ranks
    between = 2 * cut / ranks * (copies - 1) / copies
    return round(within + between + 2 * (plan.parameter_bytes(config) - cut) * (everybody - 1) / everybody)


def largest_batch(config: ViTConfig, device: int, placement: str = "replicated", ranks: int = 1, **how) -> int:
    """The largest power of two of images that a device of so many GB can train on, up to LARGEST; 0 if not even one."""
    sizes = [2**i for i in range(LARGEST.bit_length())]
    needs = {size: plan.memory(config, size, mesh=mesh(placement, ranks), **how).peak for size in sizes}
    return max((size for size, peak in needs.items() if peak <= plan.USABLE * device * 1e9), default=0)


def table(title: str, head: tuple[str, ...], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells)


def gigabytes(*sizes: float) -> str:
    """Sizes in GB, once if they are the same."""
    return " / ".join(dict.fromkeys(f"{size / 1e9:.3g}" for size in sizes))


def of_one_more(config: ViTConfig, half: bool, remat: str) -> int:
    """Bytes of activations that an image adds."""
    return plan.activations(config, 2, half, remat) - plan.activations(config, 1, half, remat)


def tables() -> str:
    """The tables of docs/scaling.md."""
    configs, both, found, rows = {name: get_config(name, dropout_rate=0) for name in MODELS}, (False, True), [], []
    for name, config in configs.items():
        size = plan.parameter_bytes(config)
        sizes = [gigabytes(part) for part in (size, plan.STATE["adamw"] * size, plan.block_bytes(config))]
        kept = [" / ".join(f"{of_one_more(config, half, remat) / 1e6:.0f}" for remat in KINDS) for half in both]
        copies = " / ".join(gigabytes(plan.kernel_copies(config, remat)) for remat in KINDS)
        rows.append([name, f"{size / 4e6:.1f}", *sizes, *kept, copies])
    title = f"A model on one device, in GB. Where three numbers stand: `--remat={' / '.join(KINDS)}`."
    images = ("an image, float32, MB", "an image, half, MB", "kernels in half")
    head = ("model", "parameters, 10^6", "parameters, momentum", "AdamW's state", "one block", *images)
    found.append(table(title, head, rows))
    for device, (ranks, _) in DEVICES.items():
        rows = []
        for name, config in configs.items():
            for placement in meshes.KINDS:
                here = mesh(placement, ranks)
                sgd, adamw = (plan.memory(config, 1, optimizer=name, mesh=here) for name in OPTIMIZERS)
                pairs = [gigabytes(a, b) for a, b in zip(sgd[1:3], adamw[1:3], strict=True)]
                gathered = gigabytes(*(plan.gathered_bytes(config, half) if sgd.gathered else 0 for half in both))
                sent = gigabytes(*(sent_bytes(config, placement, ranks, half) for half in both))
                rows.append([name, placement, gigabytes(sgd.params), *pairs, gathered, sent])
        title = f"Each of {ranks} ranks, for devices of {device} GB, in GB."
        head = ("parameters", "state, SGD / AdamW", "gradients, SGD / AdamW")
        head = ("model", "placement", *head, "gathered, float32 / half", "sent in a step, float32 / half")
        found.append(table(title, head, rows))
    for device, (ranks, many) in DEVICES.items():
        where, rows = [("replicated", 1), *((kind, ranks) for kind in meshes.KINDS), ("sharded", many)], []
        for name, config in configs.items():
            alike: dict[tuple[str, ...], list[str]] = {}
            for (optimizer, written), half in itertools.product(OPTIMIZERS.items(), both):
                fits = functools.partial(largest_batch, config, device, optimizer=optimizer, half=half)
                cells = (" / ".join(str(fits(p, n, remat=remat)) for remat in KINDS) for p, n in where)
                alike.setdefault(tuple(cells), []).append(f"{written} {'half' if half else 'float32'}")
            rows += [[name, ", ".join(how), *cells] for cells, how in alike.items()]
        title = f"Largest batch on a device of {device} GB: `--remat={' / '.join(KINDS)}`. 0: not even one image."
        head = ("model", "", "one device", *(f"{placement}, {n} ranks" for placement, n in where[1:]))
        found.append(table(title, head, rows))
    return "\n\n".join(found)


if __name__ == "__main__":
    print(tables())
