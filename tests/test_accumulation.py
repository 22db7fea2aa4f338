"""Accumulation: gradients in parts are those of the whole batch, whatever is random, compiled or adaptive."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from conftest import SMALL
from test_step import AVERAGED, CURVES, OPTIMIZERS, batch, fine_tune, fresh_state, mean_relative_error

import vitfn
from vitfn import losses, optim, tree

RANDOM = dataclasses.replace(SMALL, dropout_rate=0.1, stochastic_depth_rate=0.2)
RECIPES = {  # the reference curve's, and one that divides by the gradients' size: optimizer, steps
    "sgd": (vitfn.sgd(CURVES["token_finetune"]), 100),
    "adamw": (vitfn.adamw(vitfn.warmup_cosine(1e-3, 20, 2), weight_decay=0.1), 20),
}


@functools.cache
def curve(recipe: str, directory: str, config=SMALL, form: str = "off", parts: int = 1) -> np.ndarray:
    """The losses of a recipe on real images, in batches of 32."""
    optimizer, steps = RECIPES[recipe]
    found, _, _ = fine_tune(optimizer, directory, steps, config, compile=form, accumulation_steps=parts)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, RANDOM], ids=["plain", "random"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore:.*MD5")
def test_four_parts_follow_the_whole_batch_s_curve(recipe, config, cifar_dir):
    whole, parts = (curve(recipe, str(cifar_dir), config, parts=parts) for parts in (1, 4))
    assert mean_relative_error(parts, whole) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "form", "parts"),
    [
        ("sgd", "block", 4),
        ("adamw", "block", 4),
        ("adamw", "step", 4),
        pytest.param("sgd", "block", 1, marks=pytest.mark.full),
        pytest.param("adamw", "block", 1, marks=pytest.mark.full),
        pytest.param("sgd", "step", 1, marks=pytest.mark.full),
        pytest.param("adamw", "step", 1, marks=pytest.mark.full),
        pytest.param("sgd", "step", 4, marks=pytest.mark.full),
    ],
)
@pytest.mark.filterwarnings("ignore:.*MD5")
def test_compiled_curves_are_eager_s_with_dropout_and_stochastic_depth(form, parts, recipe, cifar_dir):
    eager = curve(recipe, str(cifar_dir), RANDOM)
    assert mean_relative_error(curve(recipe, str(cifar_dir), RANDOM, form, parts), eager) < 1e-6


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_give_one_batch_s_update(parts, loss):
    """Clipping included, which is of the sum: the step goes by the gradients of the mean over all images."""
    optimizer = optim.with_ema(vitfn.sgd(lambda step: torch.tensor(1.0), momentum=0.0), 0.9)
    images, labels = batch()
    targets = 0.6 * losses.one_hot(labels, 10) + 0.4 * losses.one_hot(labels.flip(0), 10)
    options = {"compile": "off", "max_grad_norm": 0.5, "loss": losses.LOSSES[loss], "label_smoothing": 0.1, "seed": 5}
    results = []
    for count in (1, parts):
        train_step = vitfn.make_train_step(RANDOM, optimizer, accumulation_steps=count, **options)
        state, metrics = train_step(fresh_state(optimizer), (images, targets))
        assert int(state.step) == 1
        results.append((state.params, state.opt_state, metrics))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=2e-6)


def test_one_bad_part_skips_the_whole_update():
    train_step = vitfn.make_train_step(SMALL, AVERAGED, compile="off", donate=False, accumulation_steps=4)
    state, (images, labels) = fresh_state(AVERAGED), batch()
    images = images.clone()
    images[2, 0, 0, 0] = math.inf
    after, metrics = train_step(state, (images, labels))
    assert not metrics["grad_norm"].isfinite()
    torch.testing.assert_close((after.params, after.opt_state), (state.params, state.opt_state), rtol=0, atol=0)
    assert int(after.step) == 1


def test_parts_share_one_loss_scale():
    optimizer, options = OPTIMIZERS["sgd"], {"compile": "off", "precision": "float16"}
    found = []
    for parts in (1, 4):
        train_step = vitfn.make_train_step(SMALL, optimizer, accumulation_steps=parts, **options)
        state, metrics = train_step(fresh_state(optimizer), batch())
        assert (metrics["loss_scale"], int(state.scaling["good"])) == (65536, 1)
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3)


def test_parts_keep_less_at_a_time():
    """What is kept for the gradients at once is a part's, which is what accumulation is for."""

    def most_kept(parts: int) -> int:
        alive, most = [0], [0]

        class Kept:
            def __init__(self, x: torch.Tensor):
                self.x = x
                alive[0] += x.numel()
                most[0] = max(most[0], alive[0])

            def __del__(self):
                alive[0] -= self.x.numel()

        train_step = vitfn.make_train_step(SMALL, OPTIMIZERS["sgd"], compile="off", accumulation_steps=parts)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            train_step(fresh_state(OPTIMIZERS["sgd"]), (torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.int64)))
        return most[0]

    parameters = tree.size(fresh_state(OPTIMIZERS["sgd"]).params)
    assert most_kept(4) - parameters < 0.3 * (most_kept(1) - parameters)


def test_a_batch_that_has_no_equal_parts_is_refused():
    train_step = vitfn.make_train_step(SMALL, OPTIMIZERS["sgd"], compile="off", accumulation_steps=3)
    with pytest.raises(vitfn.config.InputError, match="images: found 4, expected a multiple of accumulation_steps=3"):
        train_step(fresh_state(OPTIMIZERS["sgd"]), batch())
