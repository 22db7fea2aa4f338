"""The examples of transforms on apply, run as a user runs them, and their functions, and torch's, against references.

Independent of torch.func are autograd's own gradients and difference quotients in float64, whose error is below 1e-8
at a step of 1e-5.
"""

import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE, ROOT, SMALL, expected, nchw
from hypothesis import given, settings
from hypothesis import strategies as st

import vitfn
from vitfn import tree

EXAMPLES = ROOT / "examples"
TINY = vitfn.ViTConfig(
    patch_size=4, image_size=8, channels=1, hidden_size=8, num_layers=2, num_heads=2, mlp_dim=12, num_classes=3
)
CLASSIFIERS = pytest.mark.parametrize(
    "config", [dataclasses.replace(TINY, classifier=c) for c in ("token", "gap", "map")]
)
STEP = 1e-5

pytestmark = [  # jvp warns, once, of a torch operator's own use of a deprecated decorator
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:There is a performance drop"
    ),
]


def example(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


per_sample_gradients, private_sgd, sharpness = map(example, ("per_sample_gradients", "private_sgd", "sharpness"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(config: vitfn.ViTConfig):
    """Random parameters as a vector, logits and mean loss as functions of it, in float64."""
    params = vitfn.init(config, 0)
    x = sharpness.ravel(params).double()
    x = x + 0.3 * random(len(x))
    images, labels = random(2, 1, 8, 8, seed=1), torch.tensor([0, 2])

    def logits(x: torch.Tensor) -> torch.Tensor:
        return vitfn.apply(sharpness.unravel(x, params), images, config)

    return x, logits, lambda x: F.cross_entropy(logits(x), labels)


def direction(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A random one of length 1 in the space of x."""
    v = random(len(x), seed=seed)
    return v / v.norm()


def quotient(f, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (f(x + STEP * v) - f(x - STEP * v)) / (2 * STEP)


def gradient_by_autograd(f, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def product_by_autograd(f, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """H v by two backward passes."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(gradient @ v, x)[0]


# Transforms on apply


@CLASSIFIERS
def test_a_forward_mode_derivative_of_the_logits_is_their_difference_quotient(config):
    x, logits, loss = problem(config)
    v = direction(x, seed=2)
    found = sharpness.slope(logits, x, v)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, quotient(logits, x, v), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(sharpness.slope(loss, x, v), gradient_by_autograd(loss, x) @ v)


@CLASSIFIERS
def test_a_vjp_is_autograd_s_and_the_difference_quotient_s(config):
    x, logits, _ = problem(config)
    cotangent = random(2, 3, seed=3)
    (found,) = torch.func.vjp(logits, x)[1](cotangent)
    torch.testing.assert_close(found, gradient_by_autograd(lambda x: (logits(x) * cotangent).sum(), x))
    for seed in range(4):
        v = direction(x, seed)
        slope = (quotient(logits, x, v) * cotangent).sum()
        torch.testing.assert_close(found @ v, slope, rtol=1e-7, atol=1e-8)


@CLASSIFIERS
def test_jacrev_of_the_pixels_is_a_difference_quotient_in_each(config):
    x, _, _ = problem(config)
    params, image = sharpness.unravel(x, vitfn.init(config, 0)), random(1, 1, 8, 8, seed=1)

    def logits(pixels: torch.Tensor) -> torch.Tensor:  # (64,) -> (3,)
        return vitfn.apply(params, pixels.view(1, 1, 8, 8), config)[0]

    found = torch.func.jacrev(logits)(image.flatten())  # (3, 64)
    columns = [quotient(logits, image.flatten(), one) for one in torch.eye(64, dtype=torch.float64)]
    torch.testing.assert_close(found, torch.stack(columns, dim=1), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found, torch.func.jacfwd(logits)(image.flatten()))


@CLASSIFIERS
def test_a_hessian_vector_product_is_autograd_s_double_backward_and_a_difference_quotient(config):
    x, _, loss = problem(config)
    v = direction(x, seed=4)
    found = sharpness.hessian(loss, x)(v)
    torch.testing.assert_close(found, product_by_autograd(loss, x, v), rtol=1e-9, atol=1e-11)
    differences = quotient(lambda x: gradient_by_autograd(loss, x), x, v)
    torch.testing.assert_close(found, differences, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sharpness.hessian_by_differences(loss, x, STEP)(v), differences, rtol=1e-8, atol=1e-9)


# torch's layer_norm has a forward derivative that is wrong once it is differentiated itself (pytorch/pytorch#196700).
ORDERS = {
    "reverse over forward": lambda loss, x, v: torch.func.grad(lambda x: sharpness.slope(loss, x, v))(x),
    "forward over forward": lambda loss, x, v: sharpness.slope(lambda x: sharpness.slope(loss, x, v), x, v),
    "torch.func.hessian": lambda loss, x, v: torch.func.hessian(loss)(x) @ v,
}


@pytest.mark.parametrize("order", ORDERS)
def test_second_derivatives_in_other_orders(order):
    x, _, loss = problem(TINY)
    v = direction(x, seed=4)
    right, found = product_by_autograd(loss, x, v), ORDERS[order](loss, x, v)
    torch.testing.assert_close(found, right if found.ndim else right @ v, rtol=1e-6, atol=1e-9)


# Sharpness


def test_a_tree_as_a_vector_is_its_leaves_in_order():
    params = vitfn.init(SMALL, 0)
    vector = sharpness.ravel(params)
    assert len(vector) == tree.size(params)
    back = sharpness.unravel(vector, params)
    assert list(tree.flatten(back)) == list(tree.flatten(params))
    assert all(map(torch.equal, tree.leaves(back), tree.leaves(params)))


def symmetric(eigenvalues: torch.Tensor) -> torch.Tensor:
    basis = torch.linalg.qr(random(len(eigenvalues), len(eigenvalues))).Q
    return basis * eigenvalues @ basis.T


def test_lanczos_finds_all_eigenvalues_in_as_many_steps():
    eigenvalues = torch.tensor([-3.0, -1, -0.5, 0, 0.1, 0.2, 1, 2, 5, 11], dtype=torch.float64)
    found, bounds = sharpness.lanczos(symmetric(eigenvalues).matmul, random(10, seed=1), 10)
    torch.testing.assert_close(found, eigenvalues, rtol=0, atol=1e-10)
    assert bounds.max() < 1e-8


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_lanczos_knows_how_near_it_is(steps):
    eigenvalues = random(30, seed=2)
    found, bounds = sharpness.lanczos(symmetric(eigenvalues).matmul, random(30, seed=1), steps)
    nearest = (found[:, None] - eigenvalues).abs().amin(dim=1)
    assert len(found) == steps
    assert (nearest <= bounds + 1e-12).all()
    assert nearest.max() > 1e-4  # the bound has something to say


def test_lanczos_finds_a_large_eigenvalue_once():
    """Without new orthogonalisation it comes again after about twenty steps."""
    eigenvalues = torch.cat([torch.linspace(0, 1, 99, dtype=torch.float64), torch.tensor([1e4], dtype=torch.float64)])
    found, _ = sharpness.lanczos(symmetric(eigenvalues).matmul, random(100, seed=1), 60)
    assert (found > 2).sum() == 1
    assert math.isclose(found[-1], 1e4, rel_tol=1e-12)


@pytest.mark.slow
def test_lanczos_finds_the_largest_eigenvalue_of_a_model_s_dense_hessian():
    x, _, loss = problem(TINY)
    dense = torch.func.jacfwd(torch.func.grad(loss))(x)
    v = direction(x, seed=5)
    torch.testing.assert_close(dense @ v, product_by_autograd(loss, x, v), rtol=1e-9, atol=1e-10)
    largest = torch.linalg.eigvalsh(dense)[-1]
    found, bounds = sharpness.lanczos(sharpness.hessian(loss, x), random(len(x), seed=6), 40)
    assert math.isclose(found[-1], largest, rel_tol=1e-8)
    assert bounds[-1] < 1e-3 * largest


# Gradients of each image


def token() -> tuple[dict, torch.Tensor, torch.Tensor]:
    reference = expected("token")
    params = vitfn.load_npz(REFERENCE / "token.npz", SMALL)
    return params, nchw(reference["images"]), torch.from_numpy(reference["labels"])


def loop_by_autograd(params: dict, images: torch.Tensor, labels: torch.Tensor, config: vitfn.ViTConfig) -> dict:
    """The gradients of images one by one, stacked, without torch.func."""
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)

    def one(image: torch.Tensor, label: torch.Tensor) -> dict:
        loss = F.cross_entropy(vitfn.apply(leaves, image[None], config), label[None])
        grads = torch.autograd.grad(loss, tree.leaves(leaves), materialize_grads=True)
        return dict(zip(tree.flatten(leaves), grads, strict=True))

    ones = [one(image, label) for image, label in zip(images, labels, strict=True)]
    return tree.unflatten({path: torch.stack([each[path] for each in ones]) for path in ones[0]})


@pytest.mark.parametrize("chunk", [None, 3, 1])
def test_gradients_of_all_images_at_once_are_those_of_one_after_the_other(chunk):
    batch = token()
    found = per_sample_gradients.at_once(per_sample_gradients.gradient(SMALL), chunk)(*batch)
    reference = loop_by_autograd(*batch, SMALL)
    assert per_sample_gradients.largest_error(found, reference) < 1e-5
    assert not any(torch.equal(leaf[0], leaf[1]) for leaf in (found["cls"], found["head"]["bias"]))
    looped = per_sample_gradients.looped(per_sample_gradients.gradient(SMALL))(*batch)
    assert per_sample_gradients.largest_error(tree.map(lambda *ls: torch.stack(ls), *looped), reference) < 1e-5


def test_norms_of_all_images_at_once_are_those_of_their_gradients():
    batch = token()
    grads = loop_by_autograd(*batch, SMALL)
    norms = torch.stack([tree.norm(tree.map(lambda leaf, i=i: leaf[i], grads)) for i in range(len(batch[1]))])
    for chunk in (None, 3):
        found = per_sample_gradients.at_once(per_sample_gradients.gradient_norm(SMALL), chunk)(*batch)
        torch.testing.assert_close(found, norms, rtol=1e-5, atol=0)


def test_the_largest_error_is_of_one_image_s_array():
    reference = {"a": random(2, 3, 4), "b": {"c": random(2, 5)}, "d": torch.zeros(2, 1, dtype=torch.float64)}
    assert per_sample_gradients.largest_error(reference, reference) == 0
    found = tree.clone(reference)
    found["b"]["c"][1] *= 1.002
    assert math.isclose(per_sample_gradients.largest_error(found, reference), 0.002, rel_tol=1e-9)
    found["d"][0] = 1e-4  # nothing, of a whole of this norm
    whole = math.hypot(reference["a"][0].norm(), reference["b"]["c"][0].norm())
    assert math.isclose(per_sample_gradients.largest_error(found, reference), 0.1 / whole, rel_tol=1e-9)


@pytest.mark.slow
def test_gradients_of_16_images_at_once_are_a_loop_s_at_full_size():
    config = vitfn.get_config("ViT-Ti_16")
    params, generator = vitfn.init(config, 0), torch.Generator().manual_seed(0)
    params["head"]["kernel"].normal_(0, config.hidden_size**-0.5, generator=generator)
    batch = (params, torch.randn(16, 3, 224, 224, generator=generator), torch.arange(16) * 60)
    found = per_sample_gradients.at_once(per_sample_gradients.gradient(config))(*batch)
    assert per_sample_gradients.largest_error(found, loop_by_autograd(*batch, config)) < 1e-5


# Private SGD


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(-3, 3), st.floats(-3, 3))
def test_one_image_moves_the_clipped_sum_by_its_clipped_gradient(seed, count, spread, clip):
    """By no more than max_norm, that is, whatever the sizes of the gradients."""
    sizes = 10 ** (spread * random(count, seed=seed))  # (B,)
    gradients = {"a": random(count, 3, 2, seed=seed + 1), "b": {"c": random(count, 5, seed=seed + 2)}}
    gradients = tree.map(lambda leaf: torch.einsum("b,b...->b...", sizes, leaf), gradients)
    max_norm, total = 10**clip, private_sgd.clipped_sum(gradients, 10**clip)
    for i in range(count):
        others = torch.arange(count) != i
        without = private_sgd.clipped_sum(tree.map(lambda leaf, others=others: leaf[others], gradients), max_norm)
        moved, own = tree.map(torch.sub, total, without), tree.map(lambda leaf, i=i: leaf[i], gradients)
        assert tree.norm(moved) <= max_norm * (1 + 1e-12 * count)
        factor = min(1, max_norm / float(tree.norm(own)))
        for a, b in zip(tree.leaves(moved), tree.leaves(own), strict=True):
            torch.testing.assert_close(a, factor * b, rtol=1e-9, atol=1e-12 * count * max_norm)


def test_an_image_without_a_gradient_adds_nothing():
    gradients = {"a": torch.stack([torch.zeros(3), torch.tensor([0.0, 3, 4])])}
    assert torch.equal(private_sgd.clipped_sum(gradients, 2.5)["a"], torch.tensor([0.0, 1.5, 2]))


def test_noise_is_a_function_of_seed_and_step():
    params = vitfn.init(SMALL, 0)
    noise, again = (sharpness.ravel(private_sgd.gaussian(params, 3, 7)) for _ in range(2))
    assert torch.equal(noise, again)
    n = len(noise)
    others = [sharpness.ravel(private_sgd.gaussian(params, seed, step)) for seed, step in ((3, 8), (4, 7), (7, 3))]
    for each in (noise, *others):
        assert abs(each.mean()) < 5 / math.sqrt(n)
        assert abs(each.var() - 1) < 5 * math.sqrt(2 / n)
        assert abs((each**4).mean() - 3) < 5 * math.sqrt(96 / n)
    correlations = torch.corrcoef(torch.stack([noise, *others])) - torch.eye(4)
    assert correlations.abs().max() < 5 / math.sqrt(n)
    kernels = [
        private_sgd.gaussian(params, 3, 7)["Transformer"][f"encoderblock_{i}"]["MlpBlock_3"]["Dense_0"]["kernel"]
        for i in range(2)
    ]
    assert not torch.equal(*kernels)


def test_noise_leaves_torch_s_generator_alone():
    before = torch.get_rng_state()
    private_sgd.gaussian(vitfn.init(SMALL, 0), 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_in_units_of_the_clipped_norm_and_of_the_lot_s_average_size():
    params, images, labels = token()
    quiet, noisy = (
        private_sgd.private_gradient(params, images, labels, SMALL, 0.5, noise, 8, seed=1, step=2)
        for noise in (0.0, 3.0)
    )
    for q, n, z in zip(*map(tree.leaves, (quiet, noisy, private_sgd.gaussian(params, 1, 2))), strict=True):
        torch.testing.assert_close(n - q, 3.0 * 0.5 / 8 * z, rtol=1e-5, atol=1e-6)
    per_image = per_sample_gradients.at_once(per_sample_gradients.gradient(SMALL))(params, images, labels)
    clipped = private_sgd.clipped_sum(per_image, 0.5)
    for q, c in zip(tree.leaves(quiet), tree.leaves(clipped), strict=True):
        torch.testing.assert_close(q, c / 8, rtol=1e-5, atol=1e-8)


def test_without_noise_or_clipping_it_is_sgd():
    """Torch's own, over three steps of the mean loss."""
    params, images, labels = token()
    mine, optimizer = params, vitfn.sgd(lambda step: torch.tensor(0.1), momentum=0.0)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    theirs = torch.optim.SGD(tree.leaves(leaves), lr=0.1)
    state = optimizer.init(params)
    for step in range(3):
        grads = private_sgd.private_gradient(mine, images, labels, SMALL, math.inf, 0.0, len(images), 0, step)
        mine, state = optimizer.update(grads, state, mine, torch.tensor(step))
        theirs.zero_grad()
        F.cross_entropy(vitfn.apply(leaves, images, SMALL), labels).backward()
        theirs.step()
    for path, leaf in tree.flatten(mine).items():
        torch.testing.assert_close(leaf, tree.flatten(leaves)[path].detach(), rtol=1e-5, atol=1e-6, msg=path)
    assert tree.norm(tree.map(torch.sub, mine, params)) > 0.1


def test_a_lot_takes_each_image_by_its_own_toss():
    lots = [torch.bincount(private_sgd.lot(500, 0.1, 3, step), minlength=500) for step in range(400)]
    taken = torch.stack(lots).double()  # (steps, images)
    assert set(taken.unique().tolist()) == {0, 1}
    assert abs(taken.mean() - 0.1) < 5 * math.sqrt(0.09 / taken.numel())
    assert abs(taken.sum(1).var() - 500 * 0.09) < 5 * 500 * 0.09 * math.sqrt(2 / 400)  # sizes are binomial
    assert (taken.mean(0) - 0.1).abs().max() < 5 * math.sqrt(0.09 / 400)
    assert torch.equal(private_sgd.lot(500, 0.1, 3, 7), private_sgd.lot(500, 0.1, 3, 7))
    assert not torch.equal(private_sgd.lot(500, 0.1, 3, 7), private_sgd.lot(500, 0.1, 4, 7))


# The scripts


def run(name: str, *argv: str) -> str:
    """What a script prints that runs in the repository's root, where nothing is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, f"examples/{name}.py", *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_read_on_two_screens(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 100
    assert lines[0].startswith('"""')


@pytest.mark.slow
def test_per_sample_gradients_prints_times_and_an_error():
    out = run("per_sample_gradients", "--batch=4", "--rounds=3")
    times = re.findall(r"^(gradients|norms) +([\d.]+) ms +([\d.]+) ms +([\d.]+) \(([\d.]+) to ([\d.]+)\)$", out, re.M)
    assert [row[0] for row in times] == ["gradients", "norms"]
    assert all(float(number) > 0 for row in times for number in row[1:])
    assert float(re.search(r"largest relative error of an array: (\S+)", out)[1]) < 1e-5


@pytest.mark.slow
def test_private_sgd_prints_accuracies_and_what_an_accountant_needs():
    out = run("private_sgd", "--steps=20", "--lot=64")
    right = {
        name: float(value) for name, value in re.findall(r"^(\w+) +([\d.]+)% of the test images right$", out, re.M)
    }
    assert list(right) == ["plain", "clipped", "private"]
    assert right["plain"] > 20
    assert f"sampling rate {64 / 1438:.4f}, noise multiplier 1, 20 steps" in out


@pytest.mark.slow
def test_sharpness_prints_an_eigenvalue_that_differences_come_near():
    out = run("sharpness", "--steps=3", "--lanczos=8")
    exact = [float(value) for value in re.findall(r"largest eigenvalue (\S+),", out)]
    guessed = [float(value) for value in re.findall(r"step 0.001: (\S+),", out)]
    assert len(exact) == len(guessed) == 2
    assert all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(exact, guessed, strict=True))
    norms, slopes = (re.findall(pattern, out) for pattern in (r"norm (\S+),", r"slope (\S+)"))
    assert all(math.isclose(float(a), float(b), rel_tol=1e-3) for a, b in zip(norms, slopes, strict=True))
