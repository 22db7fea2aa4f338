"""What each process of tests/test_meshes.py does: trains on meshes, and the first writes down what came of it.

arguments: output folder, and for each training NAME,MESH,PLACEMENT,FORM,RECIPE,PRECISION,OVERLAPS joined by '|'.
"""

import dataclasses
import sys
import warnings
from pathlib import Path

import torch

from vitfn import ViTConfig, meshes, optim, parallel, rng, schedules, tree, vit
from vitfn.device import DEVICES
from vitfn.eval_step import make_eval_step
from vitfn.meshes import local
from vitfn.parallel import Ranks
from vitfn.step import TrainState, make_train_step

CONFIG = ViTConfig(
    name="small",
    patch_size=8,
    image_size=32,
    hidden_size=48,
    num_layers=3,
    num_heads=3,
    mlp_dim=96,
    num_classes=10,
    representation_size=20,
    dropout_rate=0.1,
    stochastic_depth_rate=0.1,
)
FROZEN = optim.Rules(frozen="embedding/.*|Transformer/encoderblock_0/.*(query|value)/.*")
RECIPES = {
    "sgd": (100, lambda: optim.sgd(schedules.warmup_cosine(0.03, 100, 10))),
    "adamw": (20, lambda: optim.with_ema(optim.adamw(schedules.warmup_cosine(0.001, 20, 2), weight_decay=0.1), 0.9)),
    "frozen": (5, lambda: optim.sgd(lambda step: 0.03, rules=FROZEN)),
    "parts": (5, lambda: optim.sgd(lambda step: 0.03)),
    "recomputed": (5, lambda: optim.sgd(lambda step: 0.03)),
}
BATCH, TEST = 16, 1000


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step: slopes that tell the class, and noise."""
    keys = rng.fold_in(rng.stream(step, "order"), torch.arange(BATCH))
    labels = rng.bits(keys) % 10
    noise = rng.uniform(rng.fold_in(keys, torch.arange(3 * 32 * 32)[:, None])).T.reshape(BATCH, 3, 32, 32) - 0.5
    slopes = torch.linspace(-1, 1, 10)[labels, None, None, None] * torch.linspace(-1, 1, 32)
    return (noise + slopes).float(), labels


def train(ranks: Ranks, mesh: str, placement: str, form: str, recipe: str, precision: str, overlaps: str) -> dict:
    # as on devices whose collectives leave the cores to computing
    DEVICES["cpu"] = dataclasses.replace(DEVICES["cpu"], overlaps=bool(overlaps))
    made = meshes.make(mesh, placement, ranks, "cpu")
    steps, make = RECIPES[recipe]
    optimizer = make()
    params = vit.init(CONFIG, 0, made.place)
    state = TrainState(0, params, optimizer.init(made.updated(params)))
    options = {"precision": precision, "compile": form, "compile_fallback": False, "mesh": made}
    how = {"parts": {"accumulation_steps": 2}, "recomputed": {"remat": "block"}}.get(recipe, {})
    train_step = make_train_step(CONFIG, optimizer, **how, **options)
    curve = []
    for step in range(steps):
        start, stop = ranks.span(BATCH)
        state, metrics = train_step(state, tuple(part[start:stop] for part in batch(step)))
        curve.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
    held = {
        name: sum(local(leaf).nbytes for leaf in tree.leaves(leaves))
        for name, leaves in (("params", state.params), ("opt_state", state.opt_state))
    }
    params = made.of_parameters(optim.averaged(state.params, state.opt_state))
    of_each = make_eval_step(CONFIG, **options)(params, batch(TEST))
    final = {path: made.whole(leaf) for path, leaf in tree.flatten(params).items()}
    return {
        "curve": curve,
        "held": held,
        "predicted": of_each["predicted"],
        "confidence": of_each["confidence"],
        "losses": of_each["losses"],
        "final": final,
    }


def main(folder: str, *trainings: str) -> None:
    with parallel.joined(parallel.from_environment(), DEVICES["cpu"]) as ranks:
        for training in trainings:
            name, *how = training.split("|")
            found = train(ranks, *how)
            if ranks.first:
                torch.save(found, Path(folder) / f"{name}.pt")


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    parallel.leave(0)  # as the command does, without the interpreter's own end beside Gloo's threads
