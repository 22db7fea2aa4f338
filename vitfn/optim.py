"""Optimizers as init/update pairs, clipping and averaging: small functions over trees.

The update numbered t from 0 uses the rate at t, as in Google's code.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vitfn import tree
from vitfn.schedules import Schedule, as_float
from vitfn.tree import Tree


class Rules(NamedTuple):
    """What an optimizer does to which leaves, by regular expressions over whole paths.

    `frozen` leaves are not trained: they get no gradient and no optimizer state. Weight decay works on the `decayed`
    ones. `rates` are (pattern, factor): the first that matches multiplies a leaf's learning rate.
    """

    frozen: str = ""
    decayed: str = ".*"
    rates: tuple[tuple[str, float], ...] = ()

    def trains(self, path: str) -> bool:
        return not tree.matches(self.frozen, path)

    def decays(self, path: str) -> bool:
        return tree.matches(self.decayed, path)

    def rate(self, path: str) -> float:
        return next((factor for pattern, factor in self.rates if tree.matches(pattern, path)), 1.0)


ALL = Rules()  # every leaf is trained and decays


def layer_decay(num_layers: int, factor: float) -> tuple[tuple[str, float], ...]:
    """`Rules.rates` that shrink by `factor` with each layer below the head, whose rate is whole.

    Clark et al., arXiv 2003.10555, section 3.1, for ViTs Bao et al., arXiv 2106.08254: the embedding is layer 0.
    """
    blocks = [(f"Transformer/encoderblock_{i}/.*", factor ** (num_layers - i)) for i in range(num_layers)]
    embedding = r"embedding/.*|cls|.*/pos_embedding|conv_root/.*|gn_root/.*|block\d+/.*"
    return (*blocks, (embedding, factor ** (num_layers + 1)))


class Update(Protocol):
    """(grads, opt_state, params, step) -> (params, opt_state), new trees that leave the given ones as they were.

    `grads` has the leaves that are trained. With `donate` the memory of all three trees is reused for the result.
    `finite`, a 0-d bool tensor, skips the update where it is false: parameters and optimizer state come back as they
    were, whatever the gradients hold.
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
    """A pair of functions: `init(params) -> opt_state`, and `update`, which see; its learning rate and its rules."""

    init: Callable[[Tree], Tree]
    update: Update
    schedule: Schedule
    rules: Rules = ALL


def clip_by_global_norm(grads: Tree, norm: Tensor, max_norm: float) -> Tree:
    """The gradients scaled to a global norm of at most `max_norm` (Pascanu et al., arXiv 1211.5063).

    In memory of their own, so that an update may write to them: of one image, the class token's gradient is a view of
    its position's.
    """
    flat = tree.flatten(grads)
    scaled = torch._foreach_mul(list(flat.values()), torch.where(norm < max_norm, 1.0, max_norm / norm))
    return tree.unflatten(dict(zip(flat, scaled, strict=True)))


def trained(params: Tree, rules: Rules) -> Tree:
    """The leaves that are trained."""
    return tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if rules.trains(path)})


def _at(paths: list[str], params: Tree) -> list[Tensor]:
    flat = tree.flatten(params)
    return [flat[path] for path in paths]


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


def _decayed(rules: Rules, paths: list[str], leaves: list[Tensor]) -> list[Tensor]:
    return [leaf for path, leaf in zip(paths, leaves, strict=True) if rules.decays(path)]


def _descent(schedule: Schedule, weight_decay: float, decay_schedule: Schedule | None, rules: Rules) -> Callable:
    """p <- p - rate direction for the leaves at `paths`, by the rules, as a function that writes `p`.

    big_vision's weight decay is in it; torch's is in the direction already.
    """

    def descend(
        paths: list[str], p: list[Tensor], direction: list[Tensor], step: Tensor, finite: Tensor | None
    ) -> None:
        moves = list(torch._foreach_mul(direction, _unless(finite, schedule(step), 0.0)))
        if rules.rates:
            torch._foreach_mul_(moves, [rules.rate(path) for path in paths])
        if weight_decay and decay_schedule and (decayed := _decayed(rules, paths, p)):
            decay = _unless(finite, weight_decay * decay_schedule(step), 0.0)
            torch._foreach_add_(_decayed(rules, paths, moves), torch._foreach_mul(decayed, decay))
        torch._foreach_sub_(p, moves)

    return descend


def sgd(
    schedule: Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    *,
    decay_schedule: Schedule | None = None,
    momentum_dtype: torch.dtype = torch.float32,
    rules: Rules = ALL,
) -> Optimizer:
    """Gradient descent with momentum: m <- momentum m + g + weight_decay p;  p <- p - rate m.

    Weight decay is an L2 penalty (torch.optim.SGD and the seed; Google fine-tunes without) unless `decay_schedule` is
    given, which makes it big_vision's: p also loses decay_schedule(t) weight_decay p, apart from momentum and rate.
    With a `momentum_dtype` of bfloat16 the momentum is rounded where it is stored, after its use, as in Google's.
    """
    descend = _descent(schedule, weight_decay, decay_schedule, rules)

    def init(params: Tree) -> Tree:
        return {"momentum": tree.map(lambda p: torch.zeros_like(p, dtype=momentum_dtype), trained(params, rules))}

    def update(grads, opt_state, params, step, *, finite=None, donate=False):
        grads, opt_state, params = _prepare(grads, opt_state, params, finite, donate)
        paths, g, stored = list(tree.flatten(grads)), tree.leaves(grads), tree.leaves(opt_state["momentum"])
        p = _at(paths, params)
        m = stored if momentum_dtype == torch.float32 else [leaf.float() for leaf in stored]
        if weight_decay and not decay_schedule and (decayed := _decayed(rules, paths, p)):
            penalty = torch._foreach_mul(decayed, _unless(finite, weight_decay, 0.0))
            torch._foreach_add_(_decayed(rules, paths, g), penalty)
        torch._foreach_mul_(m, _unless(finite, momentum, 1.0))
        torch._foreach_add_(m, g)
        if m is not stored:
            torch._foreach_copy_(stored, m)
        descend(paths, p, m, step, finite)
        return params, opt_state

    return Optimizer(init, update, schedule, rules)


def adamw(
    schedule: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    decay_schedule: Schedule | None = None,
    rules: Rules = ALL,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101; torch.optim.AdamW's convention).

    mu <- b1 mu + (1 - b1) g;  nu <- b2 nu + (1 - b2) g^2;
    p <- p - rate (mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps) + weight_decay p), t counting updates from 1.
    With `decay_schedule` the decay is big_vision's: decay_schedule(t) weight_decay p in place of rate weight_decay p.
    """
    descend = _descent(schedule, weight_decay, decay_schedule, rules)

    def init(params: Tree) -> Tree:
        count = torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)
        moments = trained(params, rules)
        return {"count": count, "mu": tree.map(torch.zeros_like, moments), "nu": tree.map(torch.zeros_like, moments)}

    def update(grads, opt_state, params, step, *, finite=None, donate=False):
        grads, opt_state, params = _prepare(grads, opt_state, params, finite, donate)
        count, mu, nu = opt_state["count"], tree.leaves(opt_state["mu"]), tree.leaves(opt_state["nu"])
        paths, g = list(tree.flatten(grads)), tree.leaves(grads)
        p = _at(paths, params)
        count += 1 if finite is None else finite.to(count.dtype)
        t = count.clamp(min=1)  # a first update that is skipped divides by 1 - b^1, and its rate is 0
        torch._foreach_mul_(mu, _unless(finite, b1, 1.0))
        torch._foreach_add_(mu, g, alpha=1 - b1)
        torch._foreach_mul_(nu, _unless(finite, b2, 1.0))
        torch._foreach_addcmul_(nu, g, g, value=1 - b2)
        denominator = torch._foreach_sqrt(torch._foreach_div(nu, _one_minus_power(b2, t)))
        torch._foreach_add_(denominator, eps)
        torch._foreach_mul_(denominator, _one_minus_power(b1, t))
        direction = list(torch._foreach_div(mu, denominator))
        del denominator
        if weight_decay and not decay_schedule and (decayed := _decayed(rules, paths, p)):
            torch._foreach_add_(_decayed(rules, paths, direction), decayed, alpha=weight_decay)
        descend(paths, p, direction, step, finite)
        return params, opt_state

    return Optimizer(init, update, schedule, rules)


def with_ema(optimizer: Optimizer, decay: float) -> Optimizer:
    """The optimizer, which also averages the trained leaves in opt_state["ema"]: e <- d e + (1 - d) p.

    d is min(decay, (1 + t) / (10 + t)), so that the first steps are forgotten (Polyak and Juditsky, 1992, with
    exponential weights; the warm-up is TensorFlow's ExponentialMovingAverage's).
    """

    def init(params: Tree) -> Tree:
        return {**optimizer.init(params), "ema": tree.clone(trained(params, optimizer.rules))}

    def update(grads, opt_state, params, step, *, finite=None, donate=False):
        params, opt_state = optimizer.update(grads, opt_state, params, step, finite=finite, donate=donate)
        paths, average = list(tree.flatten(opt_state["ema"])), tree.leaves(opt_state["ema"])
        weight = _unless(finite, (9 / (10 + as_float(step))).clamp(min=1 - decay), 0.0)  # 1 - d
        moves = torch._foreach_sub(_at(paths, params), average)
        torch._foreach_mul_(moves, weight)
        torch._foreach_add_(average, moves)
        return params, opt_state

    return Optimizer(init, update, optimizer.schedule, optimizer.rules)


def averaged(params: Tree, opt_state: Tree) -> Tree:
    """The parameters with their averages where `with_ema` keeps them, else as they are."""
    return tree.unflatten(tree.flatten(params) | tree.flatten(opt_state.get("ema", {})))


def _one_minus_power(base: float, exponent: Tensor) -> Tensor:
    """1 - base^exponent without the cancellation that a base close to 1 brings."""
    return -torch.expm1(math.log(base) * as_float(exponent)) if base else torch.ones_like(as_float(exponent))
