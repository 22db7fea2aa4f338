"""Sharpness of the loss along gradient descent: slopes, Hessian-vector products, the Hessian's largest eigenvalue.

Derivatives by forward mode are exact; those by differences, beside them, depend on a step that has to be guessed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # vitfn need not be installed

import vitfn
from vitfn import data, tree
from vitfn.data.augment import normalise

Function = Callable[[Tensor], Tensor]  # of a vector (n,)


def ravel(params: tree.Tree) -> Tensor:
    """The leaves as one vector, in the tree's own order: (n,)."""
    return torch.cat([leaf.flatten() for leaf in tree.leaves(params)])


def unravel(vector: Tensor, like: tree.Tree) -> tree.Tree:
    """The inverse of `ravel`: a tree of the shapes of `like`."""
    flat = tree.flatten(like)
    parts = vector.split([leaf.numel() for leaf in flat.values()])
    return tree.unflatten({path: part.view(flat[path].shape) for path, part in zip(flat, parts, strict=True)})


def slope(f: Function, x: Tensor, direction: Tensor) -> Tensor:
    """The derivative of f at x along a direction, in f(x)'s shape, by forward mode: nothing is kept for a backward."""
    return torch.func.jvp(f, (x,), (direction,))[1]


def hessian(f: Function, x: Tensor) -> Function:
    """v -> H v, the derivative along v of the gradient of a scalar f: forward over reverse (Pearlmutter, 1994)."""
    return lambda v: slope(torch.func.grad(f), x, v)


def hessian_by_differences(f: Function, x: Tensor, step: float) -> Function:
    """The same by (∇f(x + step v) - ∇f(x - step v)) / (2 step)."""
    gradient = torch.func.grad(f)
    return lambda v: (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)


def lanczos(product: Function, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (steps,), ascending, approximately, of a symmetric matrix given by its products (Lanczos, 1950).

    And how far the nearest true one is from each at most (steps,). Each direction is made orthogonal to all before it,
    twice: else rounding finds large eigenvalues again and again (Parlett, 1980).
    """
    q, diagonal, beside = start[None] / start.norm(), [], []  # q (directions, n)
    for _ in range(steps):
        w = product(q[-1])
        diagonal.append(w @ q[-1])
        for _ in range(2):
            w = w - (q @ w) @ q
        beside.append(w.norm())
        q = torch.cat([q, w[None] / beside[-1]])
    a, b = torch.stack(diagonal), torch.stack(beside)
    values, vectors = torch.linalg.eigh(a.diag() + b[:-1].diag(1) + b[:-1].diag(-1))
    return values, b[-1] * vectors[-1].abs()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="of gradient descent")
    parser.add_argument("--lanczos", type=int, default=10, help="steps, of a Hessian-vector product each")
    args = parser.parse_args()
    digits, config = data.load("digits").train.part(0, 64), vitfn.get_config("ViT-Nano_8", num_classes=10)
    images, params = normalise(digits.images, config), vitfn.init(config, seed=0)

    def loss(vector: Tensor) -> Tensor:
        return F.cross_entropy(vitfn.apply(unravel(vector, params), images, config), digits.labels)

    x, start = ravel(params), torch.randn(tree.size(params), generator=torch.Generator().manual_seed(0))
    for steps in (0, args.steps):
        for _ in range(steps):
            x = x - 0.05 * torch.func.grad(loss)(x)
        g = torch.func.grad(loss)(x)
        u, product = g / g.norm(), hessian(loss, x)
        values, bounds = lanczos(product, start, args.lanczos)
        print(f"after {steps} steps: loss {loss(x):.4f}, gradient's norm {g.norm():.5f}, slope {slope(loss, x, u):.5f}")
        print(f"  largest eigenvalue {values[-1]:.4f}, off by {bounds[-1]:.0e} at most")
        for step in (1e-1, 1e-3, 1e-5):
            guess = hessian_by_differences(loss, x, step)
            error = (guess(u) - product(u)).norm() / product(u).norm()
            value = lanczos(guess, start, args.lanczos)[0][-1]
            print(f"    by differences of gradients, step {step:<5g}: {value:.4f}, and H u is off by {error:.0e}")


if __name__ == "__main__":
    main()
