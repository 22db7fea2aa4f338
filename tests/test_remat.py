"""Recomputing: the same numbers from fewer activations, in eager blocks, compiled ones and the head of many classes."""

import dataclasses

import pytest
import torch
from conftest import SMALL
from test_step import AVERAGED, OPTIMIZERS, batch, fresh_state, train

import vitfn
from vitfn import device, remat, tree
from vitfn import step as step_module
from vitfn.errors import InputError

RANDOM = dataclasses.replace(SMALL, dropout_rate=0.1, attention_dropout_rate=0.1, stochastic_depth_rate=0.2)


def kept(config: vitfn.ViTConfig, images: torch.Tensor, **options) -> int:
    """Bytes that backward finds of what forward computed, without the parameters."""
    optimizer = vitfn.sgd(lambda step: torch.tensor(0.01))
    params = vitfn.init(config, 0)
    train_step = vitfn.make_train_step(config, optimizer, **options)
    own = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(params)}
    found = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if (storage := saved.untyped_storage()).data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), saved  # alive, so that no other has its memory
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        train_step(
            vitfn.TrainState(0, params, optimizer.init(params)), (images, torch.zeros(len(images), dtype=torch.int64))
        )
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("form", ["off", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["attention", "block"])
def test_recomputing_changes_no_number(kind, form):
    plain, state = train(AVERAGED, 4, RANDOM, compile=form, seed=3)
    history, recomputed = train(AVERAGED, 4, RANDOM, compile=form, seed=3, remat=kind)
    rounding = 0 if form == "off" else 1e-5  # other kernels
    for mine, reference in zip(history, plain, strict=True):
        assert mine == pytest.approx(reference, rel=rounding)
    torch.testing.assert_close(recomputed.params, state.params, rtol=rounding, atol=10 * rounding)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_recomputed_in_half_precision(precision):
    plain, _ = train(OPTIMIZERS["sgd"], 2, compile="off", precision=precision)
    history, _ = train(OPTIMIZERS["sgd"], 2, compile="off", precision=precision, remat="block")
    assert history == plain


@pytest.mark.parametrize("form", ["off", pytest.param("block", marks=pytest.mark.slow)])
def test_less_is_kept(form, monkeypatch):
    """Of a block the inputs, B N D numbers each; the attention branch is 5 D of a token's 7 D + 2 M."""
    before_kernels = dataclasses.replace(device.DEVICES["cpu"], backend="aot_eager_decomp_partition")
    monkeypatch.setitem(device.DEVICES, "cpu", before_kernels)  # it is decided by then
    config = dataclasses.replace(SMALL, hidden_size=192, mlp_dim=768, num_layers=8, image_size=64)
    images = torch.zeros(2, 3, 64, 64)
    none, attention, block = (kept(config, images, compile=form, remat=kind) for kind in remat.KINDS)
    assert 0.45 < attention / none < 0.75
    assert block / none < 0.25
    assert block > 7 * 2 * config.num_tokens * 192 * 4


def test_only_what_is_trained_keeps_anything():
    """A linear probe keeps the pooled features and the losses: a trunk that is frozen has no graph."""
    optimizer = vitfn.sgd(lambda step: torch.tensor(0.01), rules=vitfn.optim.Rules(frozen="(?!head/).*"))
    seen = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        seen.append(saved.shape)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        vitfn.make_train_step(SMALL, optimizer, compile="off")(fresh_state(optimizer), batch())
    assert max(shape.numel() for shape in seen) <= 48 * 10  # the head's kernel; (4, 48) features, (4, 10) logits


@pytest.mark.parametrize("loss", [vitfn.losses.softmax, vitfn.losses.sigmoid])
def test_many_classes_are_measured_in_chunks(loss, monkeypatch):
    """The same update; no more than so many logits are there at once, forward or backward."""
    options = {"compile": "off", "loss": loss, "label_smoothing": 0.1, "accumulation_steps": 2}
    whole, state = train(OPTIMIZERS["sgd"], 3, **options)
    monkeypatch.setattr(step_module, "_LOGITS", 10)  # of 4 images with 10 classes
    seen = []

    def watching(logits, *arguments):
        seen.append(logits.shape)
        return loss(logits, *arguments)

    chunked, chunked_state = train(OPTIMIZERS["sgd"], 3, **{**options, "loss": watching})
    assert set(seen) == {(1, 10)}
    assert len(seen) == 3 * 4 * 2  # steps, images, forward and backward
    for mine, reference in zip(chunked, whole, strict=True):
        assert mine == pytest.approx(reference, rel=1e-5)
    torch.testing.assert_close(chunked_state.params, state.params, rtol=1e-4, atol=1e-5)


def test_one_graph_cannot_recompute_and_says_which_form_can():
    with pytest.raises(InputError, match=r"compile=step: .* remat=block; expected block or off"):
        vitfn.make_train_step(SMALL, OPTIMIZERS["sgd"], compile="step", remat="block")
    with pytest.raises(InputError, match="remat: found 'all', expected one of none, attention, block"):
        vitfn.make_train_step(SMALL, OPTIMIZERS["sgd"], remat="all")
