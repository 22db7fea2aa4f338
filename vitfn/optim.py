"""Optimizers as init/update pairs, learning-rate schedules and clipping: small functions over trees.

The update numbered t from 0 uses the rate at t, as in Google's code. Rates are 0-d float32 tensors on the step's
device, so that nothing waits for the host.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vitfn import tree
from vitfn.tree import Tree

Schedule = Callable[[Tensor], Tensor]


class Update(Protocol):
    """(grads, opt_state, params, step) -> (params, opt_state), new trees that leave the given ones as they were.

    With `donate` the memory of all three trees is reused for the result. `finite`, a 0-d bool tensor, skips the
    update where it is false: parameters and optimizer state come back as they were, whatever the gradients hold.
    """

    def __call__(
        self,
        grads: Tree,
        opt_state: Tree,
        params: Tree,
        step: Tensor,
        *,
        finite: Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Tree, Tree]: ...


class Optimizer(NamedTuple):
    """A pair of functions: `init(params) -> opt_state`, and `update`, which see."""

    init: Callable[[Tree], Tree]
    update: Update
    schedule: Schedule


def _float(step: Tensor | int) -> Tensor:
    return torch.as_tensor(step).to(torch.float32)


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then half a cosine from `peak` to 0 at `total_steps`.

    peak * min(1, t / warmup) * (1 + cos(pi p)) / 2 with p = (t - warmup) / (total - warmup) kept in [0, 1]
    (Loshchilov and Hutter, arXiv 1608.03983, without restarts; Google's vision_transformer).
    """

    def schedule(step: Tensor) -> Tensor:
        return (
            peak
            * 0.5
            * (1 + torch.cos(math.pi * _progress(step, total_steps, warmup_steps)))
            * _warmup(step, warmup_steps)
        )

    return schedule


def warmup_linear(peak: float, total_steps: int, warmup_steps: int = 0, floor: float = 1e-5) -> Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then a line from `peak` to `floor` at `total_steps`."""

    def schedule(step: Tensor) -> Tensor:
        progress = _progress(step, total_steps, warmup_steps)
        return (floor + (peak - floor) * (1 - progress)) * _warmup(step, warmup_steps)

    return schedule


def _progress(step: Tensor, total_steps: int, warmup_steps: int) -> Tensor:
    return ((_float(step) - warmup_steps) / max(1, total_steps - warmup_steps)).clamp(0, 1)


def _warmup(step: Tensor, warmup_steps: int) -> Tensor:
    return (_float(step) / max(1, warmup_steps)).clamp(max=1) if warmup_steps else torch.ones_like(_float(step))


def clip_by_global_norm(grads: Tree, norm: Tensor, max_norm: float) -> Tree:
    """The gradients scaled, in place, to a global norm of at most `max_norm` (Pascanu et al., arXiv 1211.5063)."""
    torch._foreach_mul_(tree.leaves(grads), torch.where(norm < max_norm, 1.0, max_norm / norm))
    return grads


def _prepare(
    grads: Tree, opt_state: Tree, params: Tree, finite: Tensor | None, donate: bool
) -> tuple[Tree, Tree, Tree]:
    """The three trees in memory that may be written to, with gradients of zero where the update is skipped."""
    if not donate:
        grads, opt_state, params = tree.clone(grads), tree.clone(opt_state), tree.clone(params)
    if finite is not None:
        for grad in tree.leaves(grads):
            grad.masked_fill_(~finite, 0)
    return grads, opt_state, params


def _unless(finite: Tensor | None, value: float | Tensor, otherwise: float) -> float | Tensor:
    """`value`, or `otherwise` where the update is skipped."""
    return value if finite is None else torch.where(finite, value, otherwise)


def sgd(schedule: Schedule, momentum: float = 0.9, weight_decay: float = 0.0) -> Optimizer:
    """Gradient descent with momentum: m <- momentum m + g + weight_decay p;  p <- p - rate m.

    Weight decay is an L2 penalty on every leaf (torch.optim.SGD and the seed; Google fine-tunes without).
    """

    def init(params: Tree) -> Tree:
        return {"momentum": tree.map(torch.zeros_like, params)}

    def update(grads, opt_state, params, step, *, finite=None, donate=False):
        grads, opt_state, params = _prepare(grads, opt_state, params, finite, donate)
        p, g, m = tree.leaves(params), tree.leaves(grads), tree.leaves(opt_state["momentum"])
        if weight_decay:
            torch._foreach_add_(g, torch._foreach_mul(p, _unless(finite, weight_decay, 0.0)))
        torch._foreach_mul_(m, _unless(finite, momentum, 1.0))
        torch._foreach_add_(m, g)
        torch._foreach_add_(p, torch._foreach_mul(m, -_unless(finite, schedule(step), 0.0)))
        return params, opt_state

    return Optimizer(init, update, schedule)


def adamw(
    schedule: Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101; torch.optim.AdamW's convention).

    mu <- b1 mu + (1 - b1) g;  nu <- b2 nu + (1 - b2) g^2;
    p <- p - rate (mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps) + weight_decay p), t counting updates from 1.
    """

    def init(params: Tree) -> Tree:
        count = torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)
        return {
            "count": count,
            "mu": tree.map(torch.zeros_like, params),
            "nu": tree.map(torch.zeros_like, params),
        }

    def update(grads, opt_state, params, step, *, finite=None, donate=False):
        grads, opt_state, params = _prepare(grads, opt_state, params, finite, donate)
        count, mu, nu = opt_state["count"], tree.leaves(opt_state["mu"]), tree.leaves(opt_state["nu"])
        p, g = tree.leaves(params), tree.leaves(grads)
        count += 1 if finite is None else finite.to(count.dtype)
        t = count.clamp(min=1)  # a first update that is skipped divides by 1 - b^1, and its rate is 0
        rate = _unless(finite, schedule(step), 0.0)
        torch._foreach_mul_(mu, _unless(finite, b1, 1.0))
        torch._foreach_add_(mu, g, alpha=1 - b1)
        torch._foreach_mul_(nu, _unless(finite, b2, 1.0))
        torch._foreach_addcmul_(nu, g, g, value=1 - b2)
        denominator = torch._foreach_sqrt(torch._foreach_div(nu, _one_minus_power(b2, t)))
        torch._foreach_add_(denominator, eps)
        torch._foreach_mul_(denominator, _one_minus_power(b1, t))
        direction = torch._foreach_div(mu, denominator)
        if weight_decay:
            torch._foreach_add_(direction, p, alpha=weight_decay)
        torch._foreach_mul_(direction, rate)
        torch._foreach_sub_(p, direction)
        return params, opt_state

    return Optimizer(init, update, schedule)


def _one_minus_power(base: float, exponent: Tensor) -> Tensor:
    """1 - base^exponent without the cancellation that a base close to 1 brings."""
    return -torch.expm1(math.log(base) * _float(exponent)) if base else torch.ones_like(_float(exponent))
