"""What each process of tests/test_meshes.py does: trains on a mesh, and writes down what came of it.

arguments: output file, mesh, placement, compile form, recipe; torchrun says the rest.
"""

import dataclasses
import sys

import torch

from vitfn import ViTConfig, meshes, optim, parallel, rng, schedules, tree, vit
from vitfn.device import DEVICES
from vitfn.meshes import whole
from vitfn.step import TrainState, make_eval_step, make_train_step

CONFIG = ViTConfig(
    name="small", patch_size=8, image_size=32, hidden_size=48, num_layers=3, num_heads=4, mlp_dim=96, num_classes=10,
    representation_size=20, dropout_rate=0.1,
)  # fmt: skip
RECIPES = {
    "sgd": (100, lambda: optim.sgd(schedules.warmup_cosine(0.03, 100, 10))),
    "adamw": (20, lambda: optim.with_ema(optim.adamw(schedules.warmup_cosine(0.001, 20, 2), weight_decay=0.1), 0.9)),
    "frozen": (
        5,
        lambda: optim.sgd(lambda step: 0.1, rules=optim.Rules(frozen="embedding/.*|.*_0/.*(query|value)/.*")),
    ),
}
BATCH = 16


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch: noise around a picture of its class."""
    keys = rng.fold_in(rng.stream(step, "order"), torch.arange(BATCH))
    labels = rng.bits(keys) % 10
    noise = rng.uniform(rng.fold_in(keys, torch.arange(3 * 32 * 32)[:, None])).T.reshape(BATCH, 3, 32, 32) - 0.5
    pictures = torch.linspace(-1, 1, 10)[labels, None, None, None] * torch.linspace(-1, 1, 32)
    return (noise + pictures).float(), labels


def main(out: str, mesh: str, placement: str, form: str, recipe: str, overlaps: str = "") -> None:
    if overlaps:  # as on devices whose collectives leave the cores to computing
        DEVICES["cpu"] = dataclasses.replace(DEVICES["cpu"], overlaps=True)
    ranks = parallel.from_environment()
    with parallel.joined(ranks, DEVICES["cpu"]) as ranks:
        made = meshes.make(mesh, placement, ranks, "cpu")
        steps, make = RECIPES[recipe]
        optimizer = make()
        params = vit.init(CONFIG, 0, made.place)
        state = TrainState(0, params, optimizer.init(made.updated(params)))
        train_step = make_train_step(CONFIG, optimizer, compile=form, compile_fallback=False, mesh=made)
        curve = []
        for step in range(steps):
            images, labels = (part[slice(*ranks.span(BATCH))] for part in batch(step))
            state, metrics = train_step(state, (images, labels))
            curve.append({name: float(value) for name, value in metrics.items() if name != "device_loss"})
        weights = made.of_parameters(optim.averaged(state.params, state.opt_state))
        eval_step = make_eval_step(CONFIG, compile=form, mesh=made)
        correct = eval_step(weights, batch(1000))["correct"]
        held = {name: sum(meshes.local(leaf).nbytes for leaf in tree.leaves(leaves))
                for name, leaves in (("params", state.params), ("opt_state", state.opt_state))}  # fmt: skip
        final = {path: whole(leaf) for path, leaf in tree.flatten(weights).items()}
        if ranks.first:
            torch.save({"curve": curve, "correct": int(correct), "held": held, "final": final}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
