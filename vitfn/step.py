"""The train step and the eval step: functions of (state, batch), compiled as a whole, by block, or not at all."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfn import layers, tree
from vitfn.compile import CompiledStep, compiled
from vitfn.config import ViTConfig
from vitfn.device import Device
from vitfn.errors import InputError
from vitfn.optim import Optimizer, clip_by_global_norm
from vitfn.tree import Tree
from vitfn.vit import dropout_keys, forward

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), normalised; labels (B,) int64
Metrics = dict[str, Tensor]  # 0-d, on the device


class TrainState:
    """What training carries from step to step: `step` (0-d int64), `params` and `opt_state` (trees).

    A state that was donated to a train step has given its memory away: reading it raises RuntimeError.
    """

    __slots__ = ("_fields",)

    def __init__(self, step: Tensor | int, params: Tree, opt_state: Tree):
        where = tree.leaves(params)[0].device
        self._fields: tuple | None = (torch.as_tensor(step, dtype=torch.int64, device=where), params, opt_state)

    def _read(self) -> tuple[Tensor, Tree, Tree]:
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


def grad_and_value(loss: Callable[[Tree], Tensor]) -> Callable[[Tree], tuple[Tree, Tensor]]:
    """`torch.func.grad_and_value` over torch.autograd.grad, in which a compiled block can run."""

    def function(params: Tree) -> tuple[Tree, Tensor]:
        flat = {path: leaf.detach().requires_grad_() for path, leaf in tree.flatten(params).items()}
        value = loss(tree.unflatten(flat))
        grads = torch.autograd.grad(value, list(flat.values()), allow_unused=True, materialize_grads=True)
        return tree.unflatten({path: grad.detach() for path, grad in zip(flat, grads, strict=True)}), value.detach()

    return function


def _fused_block(params, x, config, keys=None, taps=None):
    return layers.block(params, x, config, keys, taps, fused=True)


def _make_forward(config: ViTConfig, precision: str, form: str, row: Device) -> Callable[..., Tensor]:
    """(params, images, keys) -> logits, float32 after autocast, with one compiled block for all layers if so asked."""
    dtype = PRECISIONS[precision]
    block = compiled(_fused_block, row.backend) if form == "block" else _fused_block

    def logits(params: Tree, images: Tensor, keys: Tensor | None = None) -> Tensor:
        if dtype is None:
            return forward(params, images, config, keys, block=block)
        with torch.autocast(row.name, dtype):
            return forward(params, images, config, keys, block=block).float()

    return logits


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")


def make_train_step(
    config: ViTConfig,
    optimizer: Optimizer,
    *,
    max_grad_norm: float = 1.0,
    precision: str = "float32",
    compile: str = "auto",
    seed: int = 0,
    donate: bool = True,
) -> CompiledStep:
    """`train_step(state, (images, labels)) -> (state, metrics)`: softmax cross-entropy, one update by an `Optimizer`.

    Images are (B, C, H, W), normalised, labels (B,) int64, all on the state's device. The metrics stay there as 0-d
    tensors: `loss`, `grad_norm` (global, before clipping to `max_grad_norm`) and `learning_rate`. An update whose
    gradients are not finite is skipped, while `step` advances. `precision` is float32, or bfloat16 or float16 by
    autocast (no loss scaling). `compile` is 'step' (one graph by torch.func, update included), 'block' (one
    compiled encoder block for all layers), 'off', or 'auto', the device's choice; the attribute `form` of the result
    tells which one it became. `seed` draws the dropout masks. With `donate` the given state's memory is reused, and
    using that state again raises RuntimeError.
    """
    _check_precision(precision)
    drops = config.dropout_rate > 0 or config.attention_dropout_rate > 0

    def build(form: str, row: Device) -> Callable:
        logits = _make_forward(config, precision, form, row)
        transform = torch.func.grad_and_value if form == "step" else grad_and_value

        def update(step, params, opt_state, images, labels, keys):
            grads, loss = transform(lambda params: F.cross_entropy(logits(params, images, keys), labels))(params)
            with torch.no_grad():
                norm = tree.norm(grads)
                metrics = {"loss": loss, "grad_norm": norm, "learning_rate": optimizer.schedule(step)}
                grads = clip_by_global_norm(grads, norm, max_grad_norm)
                params, opt_state = optimizer.update(
                    grads, opt_state, params, step, finite=norm.isfinite(), donate=True
                )
            return step + 1, params, opt_state, metrics

        if form == "step":
            update = compiled(update, row.backend)

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            (step, params, opt_state), (images, labels) = state._read(), batch
            own = torch.Tensor.detach if donate else lambda leaf: leaf.detach().clone()
            params, opt_state = tree.map(own, params), tree.map(own, opt_state)
            keys = None
            if drops:
                keys = dropout_keys(config, seed, step, torch.arange(len(images), device=images.device))
            *fields, metrics = update(step, params, opt_state, images, labels, keys)
            if donate:
                state._donate()
            return TrainState(*fields), metrics

        return train_step

    return CompiledStep(build, compile)


def make_eval_step(config: ViTConfig, *, precision: str = "float32", compile: str = "auto") -> CompiledStep:
    """`eval_step(params, (images, labels)) -> metrics`, sums over the batch: `loss`, `correct` and `count`.

    Images labelled -1 are padding and count for nothing, so that a last, partial batch has the shape of the others.
    `precision` and `compile` are as in `make_train_step`.
    """
    _check_precision(precision)

    def build(form: str, row: Device) -> Callable:
        logits = _make_forward(config, precision, form, row)

        def measure(params, images, labels):
            y = logits(params, images)
            return {
                "loss": F.cross_entropy(y, labels, ignore_index=-1, reduction="sum"),
                "correct": (y.argmax(-1) == labels).sum(),
                "count": (labels >= 0).sum(),
            }

        if form == "step":
            measure = compiled(measure, row.backend)

        def eval_step(params: Tree, batch: Batch) -> Metrics:
            with torch.no_grad():
                return measure(params, *batch)

        return eval_step

    return CompiledStep(build, compile)
