"""The train step and the eval step: functions of (state, batch), compiled as a whole, by block, or not at all."""

from collections.abc import Callable

import torch
from torch import Tensor

from vitfn import layers, losses, scaling, tree
from vitfn.compile import CompiledStep, compiled
from vitfn.config import ViTConfig
from vitfn.device import Device
from vitfn.errors import InputError
from vitfn.gathering import lent
from vitfn.losses import Loss
from vitfn.meshes import ONE, Cuts, Mesh, like, local
from vitfn.optim import Optimizer, clip_by_global_norm, trained
from vitfn.sums import Sums
from vitfn.tree import Tree
from vitfn.vit import dropout_keys, forward, shapes

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


def grad_and_value(loss: Callable[[Tree], Tensor]) -> Callable[[Tree], tuple[Tree, Tensor]]:
    """`torch.func.grad_and_value` over torch.autograd.grad, in which a compiled block can run."""

    def function(params: Tree) -> tuple[Tree, Tensor]:
        flat = {path: leaf.detach().requires_grad_() for path, leaf in tree.flatten(params).items()}
        value = loss(tree.unflatten(flat))
        grads = torch.autograd.grad(value, list(flat.values()), allow_unused=True, materialize_grads=True)
        return tree.unflatten({path: grad.detach() for path, grad in zip(flat, grads, strict=True)}), value.detach()

    return function


def _fused_block(params, x, config, keys=None, taps=None, branches=None):
    return layers.block(params, x, config, keys, taps, fused=True, branches=branches)


def _make_forward(config: ViTConfig, precision: str, form: str, row: Device, mesh: Mesh) -> Callable[..., Tensor]:
    """(params, images, keys) -> logits, float32 after autocast, with one compiled block for all layers if so asked.

    Of parameters that the mesh cuts it takes the parts.
    """
    dtype, cuts = PRECISIONS[precision], mesh.cuts(shapes(config), "sharded")
    block = compiled(_fused_block, row) if form == "block" else _fused_block

    def logits(params: Tree, images: Tensor, keys: Tensor | None = None) -> Tensor:
        if dtype is None:
            return forward(params, images, config, keys, block=block)
        with torch.autocast(row.name, dtype):
            return forward(params, images, config, keys, block=block).float()

    def gathering_logits(params: Tree, images: Tensor, keys: Tensor | None = None) -> Tensor:
        with lent(params, cuts, mesh, dtype, row.overlaps) as whole:
            return logits(whole, images, keys)

    return gathering_logits if cuts else logits


def _check(precision: str, compile: str, sharded: Cuts) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if sharded and compile == "step":
        raise InputError("compile=step: one graph cannot gather sharded parameters; expected block or off")


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

    On a `mesh` of several ranks each gets its share of the batch, the images of `ranks.span`, and all make the same
    update, of the mean over all: between forward and update the gradients are summed, outside of what is compiled. The
    metrics then have `device_loss` too, the mean over the own share. The state's params are `mesh.placed(params)`, and
    its opt_state is `optimizer.init(mesh.updated(params))`. Sharded parameters cannot be compiled as 'step'.
    """
    ranks, sharded, split = mesh.ranks, *(mesh.cuts(shapes(config), kind) for kind in ("sharded", "optimizer"))
    split = {path: dim for path, dim in split.items() if optimizer.rules.trains(path)}
    cuts = {**sharded, **split}
    _check(precision, compile, sharded)
    drops = bool(config.dropout_rate or config.attention_dropout_rate or config.stochastic_depth_rate)

    def build(form: str, row: Device) -> Callable:
        logits = _make_forward(config, precision, form, row, mesh)
        transform = torch.func.grad_and_value if form == "step" else grad_and_value

        def gradients(params, scales, batch, watched=None):
            """Of the part of the mean loss that these images have, scaled."""
            images, labels, keys = batch

            def part(leaves: Tree) -> Tensor:
                leaves = watched(leaves) if watched else leaves
                # torch 2.7's Dynamo cannot trace | of dicts
                everything = tree.unflatten({**tree.flatten(params), **tree.flatten(leaves)})
                each = loss(logits(everything, images, keys), labels, label_smoothing)
                value = each.sum() / (len(images) * accumulation_steps * ranks.count)
                return value * scales["scale"] if scales else value

            return transform(part)(trained(params, optimizer.rules))

        def finish(grads, norm, value, own, step, params, opt_state, scales):
            with torch.no_grad():
                if scales:
                    grads = tree.map(lambda leaf: leaf / scales["scale"], grads)
                    norm, value, own = (number / scales["scale"] for number in (norm, value, own))
                finite = norm.isfinite()
                metrics = {"loss": value, "grad_norm": norm, "learning_rate": optimizer.schedule(step)}
                if ranks.count > 1:
                    metrics["device_loss"] = own * ranks.count
                if scales:
                    metrics["loss_scale"] = scales["scale"].clone()
                    scales = scales if loss_scale else scaling.adjusted(scales, finite)
                grads = clip_by_global_norm(grads, norm, max_grad_norm)
                params, opt_state = optimizer.update(grads, opt_state, params, step, finite=finite, donate=True)
            return step + 1, params, opt_state, scales, metrics

        def update(step, params, opt_state, scales, batches):
            sums = Sums(mesh, sharded, split) if ranks.count > 1 else None
            watched = sums.watched if sums and row.overlaps and form != "step" and len(batches) == 1 else None
            grads, value = gradients(params, scales, batches[0], watched)
            for batch in batches[1:]:
                more, more_value = gradients(params, scales, batch)
                grads, value = tree.map(torch.add, grads, more), value + more_value  # not in place: leaves may overlap
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

    return CompiledStep(build, compile, compile_fallback)


def make_eval_step(
    config: ViTConfig,
    *,
    precision: str = "float32",
    compile: str = "auto",
    compile_fallback: bool = True,
    loss: Loss = losses.softmax,
    mesh: Mesh = ONE,
) -> CompiledStep:
    """`eval_step(params, (images, labels)) -> metrics`.

    Sums over the batch: `loss`, `correct` and `count`; images labelled -1 are padding and count for nothing, so that a
    last, partial batch has the shape of the others. For each image: `losses` (B,), and the class `predicted` (B,), its
    probability `confidence` (B,), and whether the label is among the `top5` (B,). With labels (B, K), of classes that
    do not exclude each other, `predicted` and `confidence` are (B, K), by the sigmoid, an image is correct where all of
    its classes are, and there is no `top5`. `precision`, `compile` and `compile_fallback` are as in `make_train_step`.
    Parameters that the `mesh` shards are a TrainState's; then all ranks call it equally often.
    """
    _check(precision, compile, mesh.cuts(shapes(config), "sharded"))

    def build(form: str, row: Device) -> Callable:
        logits = _make_forward(config, precision, form, row, mesh)

        def measure(params, images, labels):
            y = logits(params, images)
            real, known = labels >= 0, labels.clamp(min=0)
            if labels.ndim == 2:
                real = real.all(-1)
                of_each = {"confidence": y.sigmoid(), "predicted": y > 0}
                right = (of_each["predicted"] == (labels > 0.5)).all(-1)
            else:
                predicted, best = y.argmax(-1), y.topk(min(5, y.shape[-1])).indices  # (B,), (B, 5)
                confidence = y.softmax(-1).gather(-1, predicted[:, None])[:, 0]
                of_each = {"predicted": predicted, "confidence": confidence, "top5": (best == labels[:, None]).any(-1)}
                right = predicted == labels
            each = loss(y, known) * real
            sums = {"loss": each.sum(), "correct": (right & real).sum(), "count": real.sum()}
            return {**sums, "losses": each, **of_each}

        if form == "step":
            measure = compiled(measure, row)

        def eval_step(params: Tree, batch: Batch) -> Metrics:
            with torch.no_grad():
                return measure(tree.map(local, params), *batch)

        return eval_step

    return CompiledStep(build, compile, compile_fallback)
