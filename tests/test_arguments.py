"""Wrong parameters, images and states: one line that names the argument, what was found and what was expected."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import REFERENCE, SMALL, expected, nchw

import vitfn
from vitfn import tree
from vitfn.config import ResNetConfig
from vitfn.errors import InputError

OPTIMIZER = vitfn.sgd(0.03)
HYBRID = dataclasses.replace(SMALL, num_layers=1, patch_size=1, resnet=ResNetConfig((1,), 0.5))


def load() -> dict:
    return vitfn.load_npz(REFERENCE / "token.npz", SMALL)


def images() -> torch.Tensor:
    return nchw(expected("token")["images"])


def without(*paths: str) -> dict:
    return tree.unflatten({path: leaf for path, leaf in tree.flatten(load()).items() if path not in paths})


def changed(**leaves) -> dict:
    return tree.unflatten(tree.flatten(load()) | {path.replace("__", "/"): leaf for path, leaf in leaves.items()})


SCALES = [f"Transformer/encoderblock_{i}/LayerNorm_{j}/scale" for i in range(3) for j in (0, 2)]

PARAMS = {
    "an array": (lambda: np.zeros(3), "found numpy.ndarray, expected a nested dict of tensors, as vitfn.init makes it"),
    "flax's": (lambda: {"params": load()}, "found {'params': ...}, expected the tree in it: params['params']"),
    "flat": (lambda: tree.flatten(load()), "found a flat dict, expected a nested one: vitfn.tree.unflatten(params)"),
    "one missing": (lambda: without("head/bias"), "found no head/bias, expected the leaves of vitfn.shapes(config)"),
    "many missing": (
        lambda: without(*SCALES),
        f"found no {', '.join(SCALES[:3])} and 3 more, expected the leaves of vitfn.shapes(config)",
    ),
    "one too many": (
        lambda: changed(pre_logits__bias=torch.zeros(48)),
        "found pre_logits/bias, expected no leaves but those of vitfn.shapes(config)",
    ),
    "another shape": (
        lambda: changed(head__kernel=torch.zeros(48, 5), head__bias=torch.zeros(5)),
        "found head/kernel of shape (48, 5), head/bias of shape (5,), expected (48, 10), (10,)",
    ),
    "a shape that would be broadcast": (
        lambda: changed(cls=torch.zeros(1, 1, 1)), "found cls of shape (1, 1, 1), expected (1, 1, 48)"
    ),
    "numpy's leaves": (
        lambda: tree.map(lambda leaf: leaf.numpy(), load()),
        "found numpy.ndarray at cls, embedding/kernel, embedding/bias and 53 more, expected torch.Tensor: torch.as_te",
    ),
    "a tree in place of a leaf": (
        lambda: load() | {"cls": {"kernel": torch.zeros(1, 1, 48)}}, "found no cls, expected the leaves of"
    ),
}  # fmt: skip

IMAGES = {
    "an array": (lambda: images().numpy(), "found numpy.ndarray, expected a torch.Tensor (B, 3, 32, 32)"),
    "a list": (lambda: images().tolist(), "found list, expected a torch.Tensor (B, 3, 32, 32)"),
    "channels last": (
        lambda: torch.zeros(4, 32, 32, 3),
        "found shape (4, 32, 32, 3), expected (B, 3, 32, 32), which images.permute(0, 3, 1, 2) has",
    ),
    "one": (lambda: torch.zeros(3, 32, 32), "found shape (3, 32, 32), expected (B, 3, 32, 32)"),
    "a number": (lambda: torch.tensor(1.0), "found shape (), expected (B, 3, 32, 32)"),
    "pixels": (
        lambda: torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
        "found torch.uint8, expected floating-point ones, as vitfn.data.augment.normalise makes them of pixels",
    ),
    "float64": (lambda: images().double(), "found torch.float64, expected the parameters' torch.float32"),
}


@pytest.mark.parametrize("wrong", PARAMS)
def test_wrong_params_are_named(wrong):
    make, line = PARAMS[wrong]
    with pytest.raises(InputError) as refused:
        vitfn.apply(make(), images(), SMALL)
    assert str(refused.value).startswith(f"params: {line}")


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("wrong", IMAGES)
def test_wrong_images_are_named(wrong, seed):
    make, line = IMAGES[wrong]
    with pytest.raises(InputError) as refused:
        vitfn.apply(load(), make(), SMALL, seed=seed, step=seed)
    assert str(refused.value) == f"images: {line}"


def test_a_wrong_dtype_of_leaves_is_named():
    double = torch.zeros(48, 10, dtype=torch.float64)
    with pytest.raises(
        InputError, match=r"^params: found torch.float64 at head/kernel, expected the images' torch.flo"
    ):
        vitfn.apply(changed(head__kernel=double), images(), SMALL)
    with pytest.raises(
        InputError, match=r"^params: found torch.int64 at head/bias, expected the images' torch.float32"
    ):
        vitfn.apply(changed(head__bias=torch.zeros(10, dtype=torch.int64)), images(), SMALL)


def test_dtypes_of_a_hybrid_are_named():
    params, pictures = vitfn.init(HYBRID), torch.zeros(2, 3, 32, 32)
    with pytest.raises(InputError, match=r"^images: found torch.float64, expected the parameters' torch.float32$"):
        vitfn.apply(params, pictures.double(), HYBRID)
    params["conv_root"]["kernel"] = params["conv_root"]["kernel"].bfloat16()
    with pytest.raises(
        InputError, match=r"^params: found torch.bfloat16 at conv_root/kernel, expected the images' torc"
    ):
        vitfn.apply(params, pictures, HYBRID)


def test_other_errors_of_torch_s_are_torch_s(monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vitfn.vit, "forward", fail)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        vitfn.apply(load(), images(), SMALL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_that_go_together_are_not_refused(dtype):
    params = tree.to(load(), dtype)
    assert vitfn.apply(params, images().to(dtype), SMALL).dtype == dtype
    scales = {path: leaf.float() for path, leaf in tree.flatten(params).items() if path.endswith("/scale")}
    assert vitfn.apply(tree.unflatten(tree.flatten(params) | scales), images().to(dtype), SMALL).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert vitfn.apply(load(), images().bfloat16(), SMALL).dtype == torch.bfloat16


def test_features_are_asked_for_with_a_head_or_without():
    headless = dataclasses.replace(SMALL, num_classes=0)
    features = vitfn.apply(load(), images(), headless)
    assert torch.equal(features, vitfn.apply(without("head/kernel", "head/bias"), images(), headless))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"seed": 0}, "seed"),
        ({"step": torch.tensor(3)}, "step"),
        ({"sample": torch.arange(4)}, "sample"),
        ({"step": 1, "sample": torch.arange(4)}, "step, sample"),
    ],
)
def test_half_of_what_draws_dropout_is_refused(options, found):
    with pytest.raises(
        InputError, match=rf"^seed, step: found {found} alone, expected both, which draw the dropout, or"
    ):
        vitfn.apply(load(), images(), SMALL, **options)


# --- the steps


STEPS = {
    "train": lambda params, batch: vitfn.make_train_step(SMALL, OPTIMIZER)(
        vitfn.TrainState(0, params, OPTIMIZER.init(load())), batch
    ),
    "eval": lambda params, batch: vitfn.make_eval_step(SMALL)(params, batch),
    "predict": lambda params, batch: vitfn.make_predict_step(SMALL)(params, batch[:1]),
}
LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("step", STEPS)
def test_steps_name_what_is_wrong_before_they_compile(step):
    for wrong, (make, line) in IMAGES.items():
        with pytest.raises(InputError) as refused:
            STEPS[step](load(), (make(), LABELS))
        expected_line = line if wrong not in ("an array", "a list") else line.replace("3, 32, 32", "C, H, W")
        assert str(refused.value) == f"images: {expected_line}"
    for wrong in ("one missing", "another shape"):
        make, line = PARAMS[wrong]
        with pytest.raises(InputError) as refused:
            STEPS[step](make(), (images(), LABELS))
        assert str(refused.value) == f"params: {line}"


@pytest.mark.parametrize("step", ["train", "eval"])
@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (LABELS.numpy(), "found numpy.ndarray, expected a torch.Tensor (4,), or weights of the classes (4, K)"),
        (LABELS[:3], "found shape (3,), expected (4,), or weights of the classes (4, K)"),
    ],
)
def test_wrong_labels_are_named(step, labels, line):
    with pytest.raises(InputError) as refused:
        STEPS[step](load(), (images(), labels))
    assert str(refused.value) == f"labels: {line}"


def test_a_tree_is_not_a_state():
    with pytest.raises(InputError, match=r"^state: found dict, expected a vitfn.TrainState$"):
        vitfn.make_train_step(SMALL, OPTIMIZER)(load(), (images(), LABELS))


def test_a_step_takes_images_of_another_dtype_anew():
    """A shape that has been compiled for is checked again where the dtype is another."""
    predict = vitfn.make_predict_step(SMALL, compile="off")
    predict(load(), (images(),))
    with pytest.raises(InputError, match=r"^images: found torch.uint8"):
        predict(load(), (images().byte(),))
