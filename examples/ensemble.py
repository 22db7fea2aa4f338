"""Four small models trained and evaluated as one step under vmap, beside four runs: the same curves, and their time."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # vitfn need not be installed

import vitfn
from vitfn import compile, data, device, optim, timing, tree
from vitfn.data.augment import normalise
from vitfn.data.batches import batch_indices
from vitfn.tree import Tree

RATES = (0.02, 0.03, 0.04, 0.05)  # a model for each, with a seed and an order of the images of its own
Run = Callable[..., tuple[Tree, Tensor]]  # (k models, images (T, k, B, C, H, W), labels) -> stacked, losses (T, k)


def separate(config: vitfn.ViTConfig, rates: tuple[float, ...], steps: int, compiled: bool = False) -> Run:
    """The run that trains one model after the other, each by a train step of its own."""
    optimizers = [vitfn.sgd(vitfn.warmup_cosine(rate, steps, steps // 8)) for rate in rates]
    train_steps = [vitfn.make_train_step(config, each, compile="block" if compiled else "off") for each in optimizers]

    def run(models: list[Tree], images: Tensor, labels: Tensor) -> tuple[Tree, Tensor]:
        trained, losses = [], []
        for i, (optimizer, train_step, params) in enumerate(zip(optimizers, train_steps, models, strict=True)):
            state = vitfn.TrainState(0, tree.clone(params), optimizer.init(params))
            for batch in zip(images[:, i], labels[:, i], strict=True):
                state, metrics = train_step(state, batch)
                losses.append(metrics["loss"])
            trained.append(state.params)
        return tree.stack(trained), torch.stack(losses).view(len(models), -1).T

    return run


def together(config: vitfn.ViTConfig, rates: tuple[float, ...], steps: int, compiled: bool = False) -> Run:
    """The same run, in which each step is one of all models, whose leaves are (k, ...)."""
    optimizer = vitfn.sgd(vitfn.warmup_cosine(1.0, steps, steps // 8))

    def loss(params: Tree, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(vitfn.apply(params, images, config), labels)

    def gradients(params: Tree, images: Tensor, labels: Tensor) -> tuple[Tree, Tensor]:
        losses, pullback = torch.func.vjp(lambda p: torch.func.vmap(loss)(p, images, labels), params)  # (k,)
        return pullback(torch.ones_like(losses))[0], losses  # of the sum: no loss depends on another's parameters

    gradients = compile.compiled(gradients, device.DEVICES["cpu"]) if compiled else gradients

    def run(models: list[Tree], images: Tensor, labels: Tensor) -> tuple[Tree, Tensor]:
        params, losses = tree.stack(models), []
        state = optimizer.init(params)
        for t, batch in enumerate(zip(images, labels, strict=True)):  # (k, B, C, H, W), (k, B)
            grads, loss = gradients(params, *batch)
            norms = torch.stack([leaf.flatten(1).norm(dim=1) for leaf in tree.leaves(grads)]).norm(dim=0)  # (k,)
            factors = optim.clipping(norms, 1.0) * torch.tensor(rates)  # SGD is linear: each has its own rate
            grads = tree.map(lambda leaf, f=factors: leaf * f.view(-1, *[1] * (leaf.ndim - 1)), grads)
            params, state = optimizer.update(grads, state, params, torch.tensor(t), donate=True)
            losses.append(loss)
        return params, torch.stack(losses)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="images a step, for each model")
    parser.add_argument("--steps", type=int, default=30, help="of which the first 10 are timed")
    parser.add_argument("--compile", action="store_true", help="one graph, beside train steps of one compiled block")
    args = parser.parse_args()
    (train, test, _), config = data.load("digits"), vitfn.get_config("ViT-Nano_8", num_classes=10)
    seeds, steps = range(len(RATES)), range(args.steps)
    order = torch.stack([torch.stack([batch_indices(train.size, args.batch, i, t) for i in seeds]) for t in steps])
    images, labels = normalise(train.images, config)[order], train.labels[order]  # (T, k, B, C, H, W), (T, k, B)
    models, x = [vitfn.init(config, seed) for seed in seeds], normalise(test.images, config)
    runs = {run.__name__: run(config, RATES, args.steps, args.compile) for run in (separate, together)}
    (_, alone), (params, losses) = (run(models, images, labels) for run in runs.values())
    logits = torch.func.vmap(lambda params: vitfn.apply(params, x, config))(params)  # (k, N, K)
    right = [f"{(y.argmax(-1) == test.labels).float().mean():.1%}" for y in (*logits, logits.softmax(-1).mean(0))]
    print(f"{'rate':<6}{'last loss':>12}{'vmapped':>12}{'accuracy':>10}")
    for row in zip(RATES, alone[-1], losses[-1], right, strict=False):
        print("{:<6}{:>12.7f}{:>12.7f}{:>10}".format(*row))
    error = ((losses - alone).abs() / alone).max()
    print(f"all of them {right[-1]}; largest relative difference of {losses.numel()} losses {error:.1e}")
    calls = {name: lambda run=run: run(models, images[:10], labels[:10])[1].sum() for name, run in runs.items()}
    a, b = timing.steady(calls, rounds=5, limit=300).values()
    ratios = quantiles([y / x for x, y in zip(a, b, strict=True)], n=4, method="inclusive")
    text = "{1:.2f} of the time ({0:.2f} to {2:.2f})".format(*ratios)
    print(f"separate {median(a):.2f} s, together {median(b):.2f} s: {text}")


if __name__ == "__main__":
    main()
