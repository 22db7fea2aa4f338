"""Evaluation counts every image exactly once, whatever the batches are."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL

import vitfn
from vitfn.data import Split
from vitfn.evaluate import evaluate


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Noise of one colour each."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(23, 3, 20, 20, generator=generator) * torch.rand(23, 3, 1, 1, generator=generator)
    return (255 * noise).round().to(torch.uint8)


def logits_of(params: dict, images: torch.Tensor) -> torch.Tensor:
    """Of each image by itself, resized by torch."""
    resized = F.interpolate(images.float(), (32, 32), mode="bilinear", align_corners=False, antialias=False)
    return torch.cat([vitfn.apply(params, image[None], SMALL) for image in (resized - 127.5) / 127.5])


@pytest.fixture(scope="module")
def params(images) -> dict:
    """A random head, centred so that the answers vary."""
    params = vitfn.init(SMALL, 0)
    params["head"]["kernel"].normal_(generator=torch.Generator().manual_seed(1))
    params["head"]["bias"] -= logits_of(params, images).mean(0)
    return params


@pytest.fixture(scope="module")
def logits(params, images) -> torch.Tensor:
    return logits_of(params, images)


@pytest.fixture(scope="module")
def split(images, logits) -> Split:
    """The model is right about each third image, the last one among them."""
    answers = logits.argmax(-1)
    assert len(answers.unique()) > 2
    wrong = torch.arange(23) % 3 != 1
    return Split(images, (answers + wrong) % 10)


@pytest.mark.parametrize("batch_size", [1, 8, 23, 64])
def test_accuracy_is_exact_to_the_image(params, split, batch_size):
    found = evaluate(vitfn.make_eval_step(SMALL, compile="off"), params, split, SMALL, batch_size)
    assert (found["correct"], found["count"]) == (8, 23)
    assert found["accuracy"] == 8 / 23


@pytest.mark.parametrize("batch_size", [1, 8, 23, 64])
def test_loss_is_the_mean_cross_entropy(params, split, logits, batch_size):
    found = evaluate(vitfn.make_eval_step(SMALL, compile="off"), params, split, SMALL, batch_size)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)


def test_padding_does_not_count_for_class_0(split):
    """An image of padding is empty, and a model that answers class 0 to everything is not right about it."""
    params = vitfn.init(SMALL, 0)
    params["head"]["bias"][0] = 1
    found = evaluate(vitfn.make_eval_step(SMALL, compile="off"), params, split, SMALL, 16)
    assert found["correct"] == int((split.labels == 0).sum())


def test_every_batch_has_one_shape(params, split):
    """So that a compiled step is compiled once."""
    step, shapes = vitfn.make_eval_step(SMALL, compile="off"), []

    def spy(params, batch):
        shapes.append(tuple(part.shape for part in batch))
        return step(params, batch)

    evaluate(spy, params, split, SMALL, 8)
    assert shapes == [((8, 3, 32, 32), (8,))] * 3


def test_values_are_plain_floats(params, split):
    found = evaluate(vitfn.make_eval_step(SMALL, compile="off"), params, split, SMALL, 8)
    assert found.keys() == {"loss", "accuracy", "correct", "count"}
    assert {type(value) for value in found.values()} == {float}
