"""The train step: a function of (state, batch), compiled as a whole, by block, or not at all."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vitfn import layers, losses, scaling, tree
from vitfn.compile import CompiledStep, compiled, leaf_by_leaf
from vitfn.config import ViTConfig
from vitfn.device import Device
from vitfn.errors import InputError
from vitfn.logits import check, check_input, make_logits
from vitfn.losses import Loss
from vitfn.meshes import ONE, Mesh, like, local
from vitfn.optim import Optimizer, clipping, together, trained
from vitfn.remat import recomputed
from vitfn.sums import Sums
from vitfn.tree import Tree
from vitfn.vit import dropout_keys, shapes

_LOGITS = 2**23  # numbers of logits that a loss holds at once

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), normalised; labels (B,) int64, or weights of the classes (B, K)
Metrics = dict[str, Tensor]  # on the device


class TrainState:
    """What training carries from step to step: `step` (0-d int64), `params` and `opt_state` (trees).

    `scaling` is the loss scale's state under float16, which the first step makes. A state that was donated to a train
    step has given its memory away: reading it raises RuntimeError.
    """

    __slots__ = ("_fields",)

    def __init__(self, step: Tensor | int, params: Tree, opt_state: Tree, scaling: Tree | None = None):
        where = tree.leaves(params)[0].device
        self._fields: tuple | None = (
            torch.as_tensor(step, dtype=torch.int64, device=where),
            params,
            opt_state,
            scaling,
        )

    def _read(self) -> tuple[Tensor, Tree, Tree, Tree | None]:
        if self._fields is None:
            raise RuntimeError(
                "this TrainState was donated to a train step, which reused its memory: go on with the state that the "
                "step returned, or make the step with donate=False"
            )
        return self._fields

    def _donate(self) -> None:
        self._fields = None

    step = property(lambda self: self._read()[0])
    params = property(lambda self: self._read()[1])
    opt_state = property(lambda self: self._read()[2])
    scaling = property(lambda self: self._read()[3])


def grad_and_value(loss: Callable[[Tree], Tensor]) -> Callable[..., tuple[Tree, Tensor]]:
    """`torch.func.grad_and_value` over autograd, in which a compiled block and checkpoints can run.

    To `earlier` gradients, whose memory is reused, the gradients are added leaf by leaf as they come.
    """

    def function(params: Tree, earlier: Tree | None = None) -> tuple[Tree, Tensor]:
        flat = {path: leaf.detach().requires_grad_() for path, leaf in tree.flatten(params).items()}
        value = loss(tree.unflatten(flat))
        if earlier is None:
            grads = torch.autograd.grad(value, list(flat.values()), allow_unused=True, materialize_grads=True)
            return tree.unflatten({path: grad.detach() for path, grad in zip(flat, grads, strict=True)}), value.detach()
        for path, grad in tree.flatten(earlier).items():
            flat[path].grad = grad
        value.backward(inputs=list(flat.values()))
        return tree.map(lambda leaf: leaf.grad, tree.unflatten(flat)), value.detach()

    return function


def _make_losses(logits: Callable[..., Tensor], loss: Loss, smoothing: float, form: str) -> Callable[..., Tensor]:
    """(params, images, labels, keys) -> the losses (B,), without ever holding all logits of many classes."""

    def of_features(head: Tree, x: Tensor, labels: Tensor) -> Tensor:
        return loss(layers.dense(head, x).float(), labels, smoothing)

    def losses(params: Tree, images: Tensor, labels: Tensor, keys: Tensor | None) -> Tensor:
        def classify(head: Tree, x: Tensor) -> Tensor:
            parts = math.ceil(len(x) * head["bias"].numel() / _LOGITS)
            if form == "step" or parts == 1:
                return of_features(head, x, labels)
            chunks = zip(x.chunk(parts), labels.chunk(parts), strict=True)
            return torch.cat([recomputed(of_features)(head, *chunk) for chunk in chunks])

        return logits(params, images, keys, classify)

    return losses


def make_train_step(
    config: ViTConfig,
    optimizer: Optimizer,
    *,
    max_grad_norm: float = 1.0,
    precision: str = "float32",
    compile: str = "auto",
    compile_fallback: bool = True,
    seed: int = 0,
    donate: bool = True,
    loss: Loss = losses.softmax,
    label_smoothing: float = 0.0,
    accumulation_steps: int = 1,
    loss_scale: float = 0.0,
    remat: str = "none",
    mesh: Mesh = ONE,
) -> CompiledStep:
    """`train_step(state, (images, labels)) -> (state, metrics)`: one update by an `Optimizer` of the mean loss.

    Images are (B, C, H, W), normalised, labels (B,) int64 or weights of the classes (B, K), all on the state's device.
    The metrics stay there as 0-d tensors: `loss`, `grad_norm` (global, before clipping to `max_grad_norm`) and
    `learning_rate`. An update whose gradients are not finite is skipped, while `step` advances.

    `precision` is float32, or bfloat16 or float16 by autocast; under float16 the loss is scaled by `loss_scale`, or
    where that is 0 by a scale that adapts itself, and the metrics have it. `accumulation_steps` computes gradients in
    so many equal parts of the batch, one after the other. `compile` is 'step' (one graph by torch.func, update
    included; with accumulation one for the gradients and one for the update), 'block' (one compiled encoder block for
    all layers), 'off', or 'auto', the device's choice; the attribute `form` of the result tells which one it became.
    Where compiling fails, less is compiled, or with `compile_fallback` false RunError is raised. `seed` draws the
    dropout masks. With `donate` the given state's memory is reused, and using that state again raises RuntimeError.

    `remat` is what backward computes again instead of keeping it: 'none', the 'attention' branch of each encoder block,
    or the whole 'block'; the numbers are the same. It cannot be compiled as 'step'.

    On a `mesh` of several ranks each gets its share of the batch, the images of `ranks.span`, and all make the same
    update, of the mean over all: between forward and update the gradients are summed, outside of what is compiled. The
    metrics then have `device_loss` too, the mean over the own share. The state's params are `mesh.placed(params)`, and
    its opt_state is `optimizer.init(mesh.updated(params))`. Sharded parameters cannot be compiled as 'step'.
    """
    ranks, sharded, split = mesh.ranks, *(mesh.cuts(shapes(config), kind) for kind in ("sharded", "optimizer"))
    split = {path: dim for path, dim in split.items() if optimizer.rules.trains(path)}
    cuts = {**sharded, **split}
    check(precision, compile, sharded, remat)
    drops = bool(config.dropout_rate or config.attention_dropout_rate or config.stochastic_depth_rate)

    def build(form: str, row: Device) -> Callable:
        logits = make_logits(config, precision, form, row, mesh, remat)
        losses_of = _make_losses(logits, loss, label_smoothing, form)
        in_place = form != "step" and not sharded  # parts of sharded leaves' sums are there after backward alone
        through = leaf_by_leaf(row) if form == "block" and row.leaf_by_leaf else together

        def gradients(params, scales, batch, earlier=None, watched=None):
            """Of the part of the mean loss that these images have, scaled; added to those of `earlier` parts."""
            images, labels, keys = batch

            def part(leaves: Tree) -> Tensor:
                leaves = watched(leaves) if watched else leaves
                # torch 2.7's Dynamo cannot trace | of dicts
                everything = tree.unflatten({**tree.flatten(params), **tree.flatten(leaves)})
                value = losses_of(everything, images, labels, keys).sum()
                value = value / (len(images) * accumulation_steps * ranks.count)
                return value * scales["scale"] if scales else value

            leaves = trained(params, optimizer.rules)
            return torch.func.grad_and_value(part)(leaves) if form == "step" else grad_and_value(part)(leaves, earlier)

        def finish(grads, norm, value, own, step, params, opt_state, scales):
            with torch.no_grad():
                if scales:
                    norm, value, own = (number / scales["scale"] for number in (norm, value, own))
                finite = norm.isfinite()
                factor = clipping(norm, max_grad_norm)
                metrics = {"loss": value, "grad_norm": norm, "learning_rate": optimizer.schedule(step)}
                if ranks.count > 1:
                    metrics["device_loss"] = own * ranks.count
                if scales:
                    factor = factor / scales["scale"]
                    metrics["loss_scale"] = scales["scale"].clone()
                    scales = scales if loss_scale else scaling.adjusted(scales, finite)
                params, opt_state = optimizer.update(
                    grads, opt_state, params, step, scale=factor, finite=finite, donate=True, through=through
                )
            return step + 1, params, opt_state, scales, metrics

        def update(step, params, opt_state, scales, batches):
            sums = Sums(mesh, sharded, split) if ranks.count > 1 else None
            watched = sums.watched if sums and row.overlaps and form != "step" and len(batches) == 1 else None
            grads, value = gradients(params, scales, batches[0], None, watched)
            for batch in batches[1:]:
                more, more_value = gradients(params, scales, batch, grads if in_place else None)
                grads = more if in_place else tree.map(torch.add, grads, more)
                value = value + more_value
            grads, total = sums(grads, value) if sums else (grads, value)
            norm = mesh.norm(grads, cuts)
            return finish(grads, norm, total, value, step, mesh.parts(params, split), opt_state, scales)

        if form == "step" and accumulation_steps == ranks.count == 1:
            update = compiled(update, row)
        elif form == "step":  # one graph for all parts: else compiling grows with their number
            gradients, finish = compiled(gradients, row), compiled(finish, row)

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            (step, params, opt_state, scales), (images, labels) = state._read(), batch
            if len(images) % accumulation_steps:
                raise InputError(f"images: found {len(images)}, expected a multiple of {accumulation_steps=}")
            own = torch.Tensor.detach if donate else lambda leaf: leaf.detach().clone()
            parts, opt_parts = (tree.map(lambda leaf: own(local(leaf)), leaves) for leaves in (params, opt_state))
            scales = (scales or scaling.init(step.device, loss_scale)) if precision == "float16" else None
            places = torch.arange(len(images), device=images.device) + ranks.rank * len(images)
            chunks = places.chunk(accumulation_steps)
            keys = [dropout_keys(config, seed, step, chunk) if drops else None for chunk in chunks]
            batches = list(zip(images.chunk(accumulation_steps), labels.chunk(accumulation_steps), keys, strict=True))
            step, updated, opt_parts, scales, metrics = update(step, parts, opt_parts, scales, batches)
            params, opt_state = (
                tree.map(like, now, before)
                for now, before in ((mesh.spread(updated, parts, split), params), (opt_parts, opt_state))
            )
            if donate:
                state._donate()
            return TrainState(step, params, opt_state, scales), metrics

        return train_step

    def check_call(state: TrainState, batch: Batch) -> None:
        if not isinstance(state, TrainState):
            raise InputError(f"state: found {type(state).__name__}, expected a vitfn.TrainState")
        check_input(config, precision, state.params, batch)

    return CompiledStep(build, compile, compile_fallback, check_call)
