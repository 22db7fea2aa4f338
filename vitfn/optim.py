"""Optimizers as init/update pairs, clipping and averaging: small functions over trees.

The update numbered t from 0 uses the rate at t, as in Google's code.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vitfn import tree
from vitfn.schedules import Schedule, as_float, as_schedule
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
        """Whether the leaf is trained."""
        return not tree.matches(self.frozen, path)

    def decays(self, path: str) -> bool:
        """Whether weight decay works on the leaf."""
        return tree.matches(self.decayed, path)

    def rate(self, path: str) -> float:
        """The factor of the leaf's learning rate, 1 where no pattern matches."""
        for pattern, factor in self.rates:  # torch 2.7's Dynamo knows no next() with a default
            if tree.matches(pattern, path):
                return factor
        return 1.0


ALL = Rules()  # every leaf is trained and decays


def layer_decay(num_layers: int, factor: float) -> tuple[tuple[str, float], ...]:
    """`Rules.rates` that shrink by `factor` with each layer below the head, whose rate is whole.

    Clark et al., arXiv 2003.10555, section 3.1, for ViTs Bao et al., arXiv 2106.08254: the embedding is layer 0.
    """
    blocks = [(f"Transformer/encoderblock_{i}/.*", factor ** (num_layers - i)) for i in range(num_layers)]
    embedding = r"embedding/.*|cls|.*/pos_embedding|conv_root/.*|gn_root/.*|block\d+/.*"
    return (*blocks, (embedding, factor ** (num_layers + 1)))


Number = float | Tensor  # of tensors 0-d ones
Columns = tuple[list[Tensor], ...]  # leaves of several trees, in the same order
Arithmetic = Callable[..., None]  # (columns, *numbers), which writes to the columns' leaves
_AT_ONCE = 16  # leaves, so that temporaries are of few of them


def together(arithmetic: Arithmetic) -> Arithmetic:
    """Runs an update's arithmetic on several leaves at a time, as torch's foreach functions are made for."""

    def run(columns: Columns, *numbers: Any) -> None:  # torch 2.7's Dynamo cannot trace `Number | None`
        for start in range(0, len(columns[0]), _AT_ONCE):
            arithmetic(tuple(column[start : start + _AT_ONCE] for column in columns), *numbers)

    return run


class Update(Protocol):
    """(grads, opt_state, params, step) -> (params, opt_state), new trees that leave the given ones as they were.

    `grads` has the leaves that are trained; `scale`, a 0-d tensor, multiplies them first (clipping). With `donate` the
    memory of opt_state and params is reused for the result. `finite`, a 0-d bool tensor, skips the update where it is
    false: parameters and optimizer state come back as they were, whatever the gradients hold. `through` says how the
    arithmetic runs over the leaves: `together`, or compiled for each.
    """

    def __call__(
        self,
        grads: Tree,
        opt_state: Tree,
        params: Tree,
        step: Tensor,
        *,
        scale: Tensor | None = None,
        finite: Tensor | None = None,
        donate: bool = False,
        through: Callable[[Arithmetic], Arithmetic] = together,
    ) -> tuple[Tree, Tree]: ...


class Optimizer(NamedTuple):
    """A pair of functions: `init(params) -> opt_state`, and `update`, which see; its learning rate and its rules."""

    init: Callable[[Tree], Tree]
    update: Update
    schedule: Schedule
    rules: Rules = ALL


def clipping(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of a global norm are multiplied by, so that it is at most `max_norm` (Pascanu et al., arXiv
    1211.5063): 0-d.
    """
    return torch.where(norm < max_norm, 1.0, max_norm / norm)


def trained(params: Tree, rules: Rules) -> Tree:
    """The leaves that are trained."""
    return tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if rules.trains(path)})


def _groups(rules: Rules, *leaves: Mapping[str, Tensor]) -> list[tuple[float, bool, Columns]]:
    """The leaves at the paths of the first mapping by what the rules say of them: rate, decays, columns."""
    groups: dict[tuple[float, bool], list[str]] = {}
    for path in leaves[0]:
        groups.setdefault((rules.rate(path), rules.decays(path)), []).append(path)
    return [
        (rate, decays, tuple([column[path] for path in paths] for column in leaves))
        for (rate, decays), paths in groups.items()
    ]


def _unless(finite: Tensor | None, value: Number, otherwise: float) -> Number:
    """`value`, or `otherwise` where the update is skipped."""
    return value if finite is None else torch.where(finite, value, otherwise)


def _scaled(g: list[Tensor], scale: Tensor | None, finite: Tensor | None) -> list[Tensor]:
    """Gradients that are multiplied by `scale`, and are 0 where the update is skipped."""
    scaled = g if scale is None else torch._foreach_mul(g, scale)
    return [leaf if finite is None else torch.where(finite, leaf, 0) for leaf in scaled]


def _descend(p: list[Tensor], direction: list[Tensor], rate: Number, shrink: Number | None) -> None:
    """p <- p - rate direction - shrink p."""
    moves = list(torch._foreach_mul(direction, rate))
    if shrink is not None:
        torch._foreach_add_(moves, torch._foreach_mul(p, shrink))
    torch._foreach_sub_(p, moves)


def _decay(factor: float, dtype: torch.dtype | None) -> float:
    """What a moment is multiplied by: the factor as its dtype rounds it, so that bfloat16's 0.9 is 0.8984375.

    optax multiplies a bfloat16 trace or mu by a Python number, which takes that dtype. The product of two bfloat16
    numbers is exact in float32, and so XLA keeps it where it compiles, as Google's programs do; eager JAX, and XLA
    without --xla_allow_excess_precision, round it to bfloat16 too.
    """
    return factor if dtype is None else torch.tensor(factor, dtype=dtype, device="cpu").item()


def _accumulate(stored: list[Tensor], keep: Number, g: list[Tensor], weight: float = 1.0) -> list[Tensor]:
    """stored <- keep stored + weight g; returns the sums as they are before `stored` rounds them to its dtype."""
    exact = stored[0].dtype == g[0].dtype
    total = stored if exact else [leaf.to(g[0].dtype) for leaf in stored]
    torch._foreach_mul_(total, keep)
    torch._foreach_add_(total, g, alpha=weight)
    if not exact:
        torch._foreach_copy_(stored, total)
    return total


def sgd(
    schedule: Schedule | float,
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
    A `momentum_dtype` of bfloat16 is optax's accumulator_dtype, with which Google fine-tunes: the stored m is
    multiplied by 0.8984375, which is 0.9 in bfloat16, the sum is float32's, and it is rounded where it is stored, after
    its use. A number in place of the `schedule` is a constant rate.
    """
    schedule = as_schedule(schedule)
    momentum = _decay(momentum, momentum_dtype)

    def init(params: Tree) -> Tree:
        return {"momentum": tree.map(lambda p: torch.zeros_like(p, dtype=momentum_dtype), trained(params, rules))}

    def arithmetic(columns, scale, finite, rate, shrink, penalty, keep):
        g, stored, p = columns
        g = _scaled(g, scale, finite)
        if penalty is not None:
            g = torch._foreach_add(g, torch._foreach_mul(p, penalty))
        _descend(p, _accumulate(stored, keep, g), rate, shrink)

    def update(grads, opt_state, params, step, *, scale=None, finite=None, donate=False, through=together):
        if not donate:
            opt_state, params = tree.clone(opt_state), tree.clone(params)
        rate, keep = _unless(finite, schedule(step), 0.0), _unless(finite, momentum, 1.0)
        decay = _unless(finite, weight_decay * (decay_schedule(step) if decay_schedule else 1), 0.0)
        trees = (grads, opt_state["momentum"], params)
        for factor, decays, columns in _groups(rules, *map(tree.flatten, trees)):
            shrink, penalty = (decay * decays, None) if decay_schedule else (None, decay * decays)
            terms = (shrink, penalty) if weight_decay else (None, None)
            through(arithmetic)(columns, scale, finite, rate * factor, *terms, keep)
        return params, opt_state

    return Optimizer(init, update, schedule, rules)


def adamw(
    schedule: Schedule | float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    decay_schedule: Schedule | None = None,
    mu_dtype: torch.dtype | None = None,
    rules: Rules = ALL,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101; torch.optim.AdamW's convention).

    mu <- b1 mu + (1 - b1) g;  nu <- b2 nu + (1 - b2) g^2;
    p <- p - rate (mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps) + weight_decay p), t counting updates from 1.
    With `decay_schedule` the decay is big_vision's: decay_schedule(t) weight_decay p in place of rate weight_decay p.
    A `mu_dtype` of bfloat16 is optax's, which big_vision trains with: the stored mu is multiplied by b1 in bfloat16
    (0.9 is 0.8984375), and rounded where it is stored, after its use; 1 - b1 and the power of b1 are as they were. By
    default mu is of the parameters' dtype, as nu is. A number in place of the `schedule` is a constant rate.
    """
    schedule = as_schedule(schedule)
    keep_mu = _decay(b1, mu_dtype)

    def init(params: Tree) -> Tree:
        count = torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)
        moments = trained(params, rules)
        mu = tree.map(lambda p: torch.zeros_like(p, dtype=mu_dtype), moments)
        return {"count": count, "mu": mu, "nu": tree.map(torch.zeros_like, moments)}

    def arithmetic(columns, scale, finite, rate, shrink, keep1, keep2, correction1, correction2):
        g, stored, nu, p = columns
        g = _scaled(g, scale, finite)
        mu = _accumulate(stored, keep1, g, 1 - b1)
        torch._foreach_mul_(nu, keep2)
        torch._foreach_addcmul_(nu, g, g, value=1 - b2)
        denominator = torch._foreach_sqrt(torch._foreach_div(nu, correction2))
        torch._foreach_add_(denominator, eps)
        torch._foreach_mul_(denominator, correction1)
        _descend(p, list(torch._foreach_div(mu, denominator)), rate, shrink)

    def update(grads, opt_state, params, step, *, scale=None, finite=None, donate=False, through=together):
        if not donate:
            opt_state, params = tree.clone(opt_state), tree.clone(params)
        opt_state["count"].add_(1 if finite is None else finite.to(torch.int64))
        t = opt_state["count"].clamp(min=1)  # a first update that is skipped divides by 1 - b^1, and its rate is 0
        rate, moments = _unless(finite, schedule(step), 0.0), (_unless(finite, keep_mu, 1.0), _unless(finite, b2, 1.0))
        corrections = (_one_minus_power(b1, t), _one_minus_power(b2, t))
        trees = (grads, opt_state["mu"], opt_state["nu"], params)
        for factor, decays, columns in _groups(rules, *map(tree.flatten, trees)):
            own = rate * factor
            decay = _unless(finite, decay_schedule(step), 0.0) if decay_schedule else own
            shrink = decay * (weight_decay * decays) if weight_decay else None
            through(arithmetic)(columns, scale, finite, own, shrink, *moments, *corrections)
        return params, opt_state

    return Optimizer(init, update, schedule, rules)


def with_ema(optimizer: Optimizer, decay: float) -> Optimizer:
    """The optimizer, which also averages the trained leaves in opt_state["ema"]: e <- d e + (1 - d) p.

    d is min(decay, (1 + t) / (10 + t)), so that the first steps are forgotten (Polyak and Juditsky, 1992, with
    exponential weights; the warm-up is TensorFlow's ExponentialMovingAverage's).
    """

    def init(params: Tree) -> Tree:
        return {**optimizer.init(params), "ema": tree.clone(trained(params, optimizer.rules))}

    def arithmetic(columns, weight):
        average, p = columns
        torch._foreach_add_(average, torch._foreach_mul(torch._foreach_sub(p, average), weight))

    def update(grads, opt_state, params, step, *, finite=None, donate=False, through=together, **how):
        params, opt_state = optimizer.update(
            grads, opt_state, params, step, finite=finite, donate=donate, through=through, **how
        )
        average, p = tree.flatten(opt_state["ema"]), tree.flatten(params)
        weight = _unless(finite, (9 / (10 + as_float(step))).clamp(min=1 - decay), 0.0)  # 1 - d
        through(arithmetic)((list(average.values()), [p[path] for path in average]), weight)
        return params, opt_state

    return Optimizer(init, update, optimizer.schedule, optimizer.rules)


def averaged(params: Tree, opt_state: Tree) -> Tree:
    """The parameters with their averages where `with_ema` keeps them, else as they are."""
    return tree.unflatten(tree.flatten(params) | tree.flatten(opt_state.get("ema", {})))


def _one_minus_power(base: float, exponent: Tensor) -> Tensor:
    """1 - base^exponent without the cancellation that a base close to 1 brings."""
    return -torch.expm1(math.log(base) * as_float(exponent)) if base else torch.ones_like(as_float(exponent))
