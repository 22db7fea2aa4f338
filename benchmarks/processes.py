"""Data parallel on two cores: two processes with a thread each against one process with two, on the same batches.

    torchrun --nproc_per_node=2 benchmarks/processes.py [MODEL BATCH MESH]

Both do a step in turn, so that what else runs on the machine slows both; prints the median ratio of their throughputs.
"""

import statistics
import sys
import time

import torch

import vitfn
from vitfn import meshes, optim, parallel
from vitfn.device import DEVICES
from vitfn.meshes import ONE
from vitfn.step import TrainState, make_train_step

ROUNDS = 15


def main(model: str = "ViT-Ti_16", batch: str = "16", mesh: str = "") -> None:
    config, size = vitfn.get_config(model, num_classes=10), int(batch)
    images, labels = torch.randn(size, 3, 224, 224), torch.arange(size) % 10
    optimizer = optim.sgd(lambda step: 0.001)
    with parallel.joined(parallel.from_environment(), DEVICES["cpu"]) as ranks:

        def one_of(mesh: meshes.Mesh):
            params = vitfn.init(config, 0, mesh.place)
            state = TrainState(0, params, optimizer.init(mesh.updated(params)))
            start, stop = mesh.ranks.span(size)
            share, step = (images[start:stop], labels[start:stop]), make_train_step(config, optimizer, mesh=mesh)

            def seconds() -> float:
                nonlocal state
                started = time.perf_counter()
                state, metrics = step(state, share)
                float(metrics["loss"])
                return time.perf_counter() - started

            return seconds

        together, alone = one_of(meshes.make(mesh, "sharded", ranks, "cpu")), one_of(ONE)
        ratios, times = [], []
        for place in range(ROUNDS + 2):
            torch.set_num_threads(1)
            ranks.max(0)  # both begin at once
            several = together()
            ranks.max(0)
            torch.set_num_threads(2)
            if ranks.first:
                one = alone()
                if place >= 2:  # the first calls compile
                    ratios.append(one / several)
                    times.append((several, one))
        if ranks.first:
            several, one = (statistics.median(column) for column in zip(*times, strict=True))
            low, median, high = statistics.quantiles(ratios, n=4)
            print(f"{model}, batch {size}, mesh {mesh or 'data=2'}: two processes {several:.3f} s, one {one:.3f} s")
            print(f"throughput of two / of one: {median:.2f}, quartiles {low:.2f} to {high:.2f}, n={ROUNDS}")


if __name__ == "__main__":
    main(*sys.argv[1:])
