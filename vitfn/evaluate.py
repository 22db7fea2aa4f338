"""Evaluation over a whole split: every image counts once."""

from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

from vitfn.config import ViTConfig
from vitfn.data import Split
from vitfn.data.augment import normalise, resize
from vitfn.data.batches import padded_batches
from vitfn.tree import Tree


def evaluate(
    eval_step: Callable[[Tree, tuple[Tensor, Tensor]], dict[str, Tensor]],
    params: Tree,
    split: Split,
    config: ViTConfig,
    batch_size: int,
) -> dict[str, float]:
    """Mean `loss`, `accuracy` (0 to 1), and `correct` of `count` images, of a split on the parameters' device."""
    batches = -(-len(split.labels) // batch_size)
    totals: dict[str, Tensor | float] = {"loss": 0.0, "correct": 0.0, "count": 0.0}
    bar = tqdm(padded_batches(split, batch_size), "evaluating", batches, unit="batch", delay=2, leave=False)
    for images, labels in bar:
        sums = eval_step(params, (normalise(resize(images, config.image_hw), config), labels))
        totals = {name: total + sums[name] for name, total in totals.items()}  # stays on the device
    loss, correct, count = (float(totals[name]) for name in ("loss", "correct", "count"))
    return {"loss": loss / count, "accuracy": correct / count, "correct": correct, "count": count}
