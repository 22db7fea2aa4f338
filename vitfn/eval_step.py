"""What a model says of a batch: the eval step, beside its labels, and the predict step, of images alone."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vitfn import losses, tree
from vitfn.compile import CompiledStep, compiled
from vitfn.config import ViTConfig
from vitfn.device import Device
from vitfn.logits import check, check_input, make_logits
from vitfn.losses import Loss
from vitfn.meshes import ONE, Mesh, local
from vitfn.step import Batch, Metrics
from vitfn.tree import Tree
from vitfn.vit import shapes


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
    check(precision, compile, mesh.cuts(shapes(config), "sharded"))

    def build(form: str, row: Device) -> Callable:
        logits = make_logits(config, precision, form, row, mesh)

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

    return CompiledStep(build, compile, compile_fallback, partial(check_input, config, precision))


def probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """Of the classes, by softmax, or by the sigmoid where they do not exclude each other: (..., K) -> (..., K)."""
    return logits.sigmoid() if multi_label else logits.softmax(-1)


def make_predict_step(
    config: ViTConfig,
    *,
    precision: str = "float32",
    compile: str = "auto",
    compile_fallback: bool = True,
    multi_label: bool = False,
) -> CompiledStep:
    """`predict_step(params, (images,)) -> probabilities` of the classes: (B, C, H, W), normalised, -> (B, K) float32.

    `multi_label` is for models whose classes do not exclude each other. `precision`, `compile` and `compile_fallback`
    are as in `make_train_step`.
    """
    check(precision, compile, {})

    def build(form: str, row: Device) -> Callable:
        logits = make_logits(config, precision, form, row, ONE)

        def of_images(params: Tree, images: Tensor) -> Tensor:
            return probabilities(logits(params, images), multi_label)

        if form == "step":
            of_images = compiled(of_images, row)

        def predict_step(params: Tree, batch: tuple[Tensor]) -> Tensor:
            with torch.no_grad():
                return of_images(params, *batch)

        return predict_step

    return CompiledStep(build, compile, compile_fallback, partial(check_input, config, precision))
