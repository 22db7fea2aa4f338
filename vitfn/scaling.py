"""Loss scaling for float16, as a small state on the device (Micikevicius et al., arXiv 1710.03740, section 3.2).

The loss is multiplied by `scale` before the gradients are taken, and the gradients are divided by it, so that small
ones do not vanish in half precision. Whoever finds gradients that are not finite skips the update and halves the scale.
"""

import torch
from torch import Tensor

from vitfn.tree import Tree

_FIRST, _LARGEST = 2.0**16, 2.0**24
_GROWTH_INTERVAL = 2000  # good updates after which the scale is doubled


def init(device: torch.device, scale: float = 0.0) -> Tree:
    """{"scale", "good"}: the scale, 65536 unless given, and the good updates since it last changed."""
    return {
        "scale": torch.full((), scale or _FIRST, dtype=torch.float32, device=device),
        "good": torch.zeros((), dtype=torch.int64, device=device),
    }


def adjusted(scaling: Tree, finite: Tensor) -> Tree:
    """The state after an update whose gradients were `finite` (0-d bool), or after one that was skipped."""
    scale, good = scaling["scale"], torch.where(finite, scaling["good"] + 1, 0)
    grow = good >= _GROWTH_INTERVAL
    scale = torch.where(finite, torch.where(grow, 2 * scale, scale), scale / 2).clamp(1, _LARGEST)
    return {"scale": scale, "good": torch.where(grow, 0, good)}
