"""What each process of tests/test_meshes.py holds of ViT-B_16: what lies there, and the most that is gathered."""

import json
import sys
import warnings

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vitfn import get_config, meshes, optim, parallel, tree, vit
from vitfn.device import DEVICES
from vitfn.parallel import Ranks
from vitfn.step import TrainState, make_train_step

CONFIG = get_config("ViT-B_16", image_size=32, num_classes=1000)


def step(ranks: Ranks, mesh: str, placement: str, precision: str) -> list[tuple[int, int]]:
    """Of each process: the bytes of its parameters and momentum, and the most that was gathered at once."""
    gathered: list[tuple[StorageWeakRef, int]] = []
    peak, all_gather = 0, meshes._all_gather

    def counting(whole, part, **options):
        nonlocal peak
        gathered.append((StorageWeakRef(whole.untyped_storage()), whole.untyped_storage().nbytes()))
        gathered[:] = [(storage, size) for storage, size in gathered if not storage.expired()]
        peak = max(peak, sum(size for _, size in gathered))
        return all_gather(whole, part, **options)

    meshes._all_gather = counting
    made = meshes.make(mesh, placement, ranks, "cpu")
    optimizer = optim.sgd(lambda step: 0.03)
    params = vit.init(CONFIG, 0, made.place)
    state = TrainState(0, params, optimizer.init(made.updated(params)))
    del params
    train_step = make_train_step(CONFIG, optimizer, compile="off", mesh=made, precision=precision)
    state, _ = train_step(state, (torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)))
    meshes._all_gather = all_gather
    lies = sum(meshes.local(leaf).nbytes for leaves in (state.params, state.opt_state) for leaf in tree.leaves(leaves))
    return ranks.gather((lies, peak))


def main(*steps: str) -> None:
    with parallel.joined(parallel.from_environment(), DEVICES["cpu"]) as ranks:
        for each in steps:
            found = step(ranks, *each.split("|"))
            if ranks.first:
                print(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    parallel.leave(0)  # as the command does, without the interpreter's own end beside Gloo's threads
