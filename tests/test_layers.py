"""The layers against closed forms in float64 numpy, and their gradients against finite differences."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import SMALL
from torch.autograd import gradcheck

from vitfn import layers, tree

B, N, D = 2, 5, 12
CONFIG = dataclasses.replace(SMALL, hidden_size=D, num_heads=3, mlp_dim=20)


def random_params(shapes: dict, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64), shapes)


def random_input(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def as_numpy(params: dict) -> dict:
    return tree.map(lambda leaf: leaf.numpy(), params)


def numpy_layer_norm(p: dict, x: np.ndarray) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * p["scale"] + p["bias"]


def numpy_attention(p: dict, x: np.ndarray) -> np.ndarray:
    q, k, v = (np.einsum("bnd,dhe->bnhe", x, p[name]["kernel"]) + p[name]["bias"] for name in ("query", "key", "value"))
    scores = np.einsum("bnhe,bmhe->bhnm", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhe,hed->bnd", weights, v, p["out"]["kernel"]) + p["out"]["bias"]


def numpy_gelu(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def numpy_mlp(p: dict, x: np.ndarray, kind: str) -> np.ndarray:
    x = numpy_gelu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], kind)
    return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def test_dense_is_x_w_plus_b():
    params, x = random_params(layers.dense_shapes(D, 7)), random_input(B, N, D)
    expected = x.numpy() @ params["kernel"].numpy() + params["bias"].numpy()
    np.testing.assert_allclose(layers.dense(params, x).numpy(), expected, rtol=1e-12)


def test_layer_norm_is_its_formula():
    params, x = random_params(layers.layer_norm_shapes(CONFIG)), random_input(B, N, D)
    expected = numpy_layer_norm(as_numpy(params), x.numpy())
    np.testing.assert_allclose(layers.layer_norm(params, x, CONFIG).numpy(), expected, rtol=1e-10)


def test_layer_norm_uses_the_config_s_epsilon():
    params, x = random_params(layers.layer_norm_shapes(CONFIG)), 1e-3 * random_input(B, N, D)
    large = dataclasses.replace(CONFIG, layer_norm_eps=1e-2)
    assert not torch.allclose(layers.layer_norm(params, x, CONFIG), layers.layer_norm(params, x, large), rtol=1e-2)


@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_its_formula(fused):
    params, x = random_params(layers.attention_shapes(CONFIG)), random_input(B, N, D)
    expected = numpy_attention(as_numpy(params), x.numpy())
    np.testing.assert_allclose(layers.attention(params, x, CONFIG, fused=fused).numpy(), expected, rtol=1e-9)


def test_attention_pooling_is_attention_of_one_query():
    params, x = random_params(layers.attention_shapes(CONFIG)), random_input(B, N, D)
    expected = numpy_attention(as_numpy(params), x.numpy())
    for place in range(N):
        found = layers.attention_pooling(params, x, x[:, place], CONFIG)
        np.testing.assert_allclose(found.numpy(), expected[:, place], rtol=1e-9)
    one_for_all = layers.attention_pooling(params, x, x[:1, 0], CONFIG)
    each = layers.attention_pooling(params, x, x[:1, 0].expand(B, -1), CONFIG)
    torch.testing.assert_close(one_for_all, each)


@pytest.mark.parametrize("kind", ["tanh", "erf"])
def test_mlp_is_its_formula(kind):
    config = dataclasses.replace(CONFIG, gelu=kind)
    params, x = random_params(layers.mlp_shapes(CONFIG)), random_input(B, N, D)
    np.testing.assert_allclose(
        layers.mlp(params, x, config).numpy(), numpy_mlp(as_numpy(params), x.numpy(), kind), rtol=1e-9, atol=1e-12
    )


def test_block_is_pre_norm_with_residuals():
    params, x = random_params(layers.block_shapes(CONFIG)), random_input(B, N, D)
    p, y = as_numpy(params), x.numpy()
    y = y + numpy_attention(p["MultiHeadDotProductAttention_1"], numpy_layer_norm(p["LayerNorm_0"], y))
    y = y + numpy_mlp(p["MlpBlock_3"], numpy_layer_norm(p["LayerNorm_2"], y), "tanh")
    np.testing.assert_allclose(layers.block(params, x, CONFIG).numpy(), y, rtol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_block_gradients_are_finite_differences(fused):
    params, x = random_params(layers.block_shapes(CONFIG)), random_input(1, 3, D)
    flat = {path: (0.3 * leaf).requires_grad_() for path, leaf in tree.flatten(params).items()}

    def function(x, *values):
        return layers.block(tree.unflatten(dict(zip(flat, values, strict=True))), x, CONFIG, fused=fused)

    assert gradcheck(function, (x.requires_grad_(), *flat.values()), fast_mode=True)


DROPPING = {"dropout_rate": 0.3, "attention_dropout_rate": 0.3}


@pytest.mark.parametrize("rates", [{}, DROPPING], ids=["", "dropout"])
def test_a_pooled_block_is_the_first_token_s_and_so_are_its_gradients(rates):
    """The same masks, weights and gradients, and these lie as the parameters do."""
    config = dataclasses.replace(CONFIG, **rates)
    params, x = random_params(layers.block_shapes(CONFIG)), random_input(B, N, D)
    keys = torch.arange(4 * B).reshape(4, B) * 1_000_003
    weights = random_input(B, 1, D)

    def pulled(pooled: bool):
        leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
        tokens, taps = x.clone().requires_grad_(), {}
        y = layers.block(leaves, tokens, config, keys, taps, branches=FACTORS[:, :B] + 1, pooled=pooled)[:, :1]
        (y * weights).sum().backward()
        return y, taps["weights"][:, :, :1], tokens.grad, tree.map(lambda leaf: leaf.grad, leaves)

    (*found, leaves), (*expected, whole) = pulled(True), pulled(False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    whole["MultiHeadDotProductAttention_1"]["key"]["bias"] = leaves["MultiHeadDotProductAttention_1"]["key"]["bias"]
    torch.testing.assert_close(leaves, whole, rtol=1e-9, atol=1e-11)
    assert all(leaf.is_contiguous() for leaf in tree.leaves(leaves) if leaf is not None)


def test_a_key_s_bias_changes_nothing():
    """Which is why it is never added: the formula with it gives the same numbers."""
    params, x = random_params(layers.attention_shapes(CONFIG)), random_input(B, N, D)
    with_bias = numpy_attention(as_numpy(params), x.numpy())
    params["key"]["bias"] += 100
    np.testing.assert_allclose(layers.attention(params, x, CONFIG).numpy(), with_bias, rtol=1e-9)


KEYS = torch.tensor([11, 22, 33])


def test_dropout_zeroes_at_its_rate_and_keeps_the_mean():
    y = layers.dropout(torch.ones(3, 200, 300), 0.3, KEYS)
    assert torch.equal(y.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (y == 0).float().mean(dim=(1, 2)).sub(0.3).abs().max() < 0.01


def test_dropout_is_a_function_of_each_sample_s_key():
    x = torch.ones(3, 50, 60)
    y = layers.dropout(x, 0.5, KEYS)
    assert torch.equal(y, layers.dropout(x, 0.5, KEYS))
    assert torch.equal(y[1:], layers.dropout(x[1:], 0.5, KEYS[1:]))
    assert (y[0] == y[1]).float().mean().sub(0.5).abs() < 0.05  # independent masks agree half of the time


def test_dropout_without_keys_or_rate_is_the_identity():
    x = torch.randn(2, 3, 4)
    assert layers.dropout(x, 0.5, None) is x
    assert layers.dropout(x, 0.0, KEYS) is x


def test_block_drops_in_four_places():
    """Each row of keys draws one mask: changing it alone changes the result."""
    config = dataclasses.replace(CONFIG, dropout_rate=0.5, attention_dropout_rate=0.5)
    params, x = random_params(layers.block_shapes(CONFIG)), random_input(B, N, D)
    keys = torch.arange(8).reshape(4, B) * 1_000_003
    y = layers.block(params, x, config, keys)
    for place in range(4):
        other = keys.clone()
        other[place] += 77
        assert not torch.allclose(y, layers.block(params, x, config, other))


def test_mlp_dropout_mask_is_shared_by_eager_and_gradient():
    config = dataclasses.replace(CONFIG, dropout_rate=0.5)
    params, x = random_params(layers.mlp_shapes(CONFIG)), random_input(B, N, D)
    y, vjp = torch.func.vjp(lambda x: layers.mlp(params, x, config, KEYS[:B]), x)
    assert torch.equal(y, layers.mlp(params, x, config, KEYS[:B]))
    assert vjp(torch.ones_like(y))[0].shape == x.shape


def test_taps_receive_attention_weights_and_activations():
    params, x, taps = random_params(layers.block_shapes(CONFIG)), random_input(B, N, D), {}
    y = layers.block(params, x, CONFIG, taps=taps, fused=True)
    torch.testing.assert_close(y, layers.block(params, x, CONFIG))
    assert taps["weights"].shape == (B, 3, N, N)
    torch.testing.assert_close(taps["weights"].sum(-1), torch.ones(B, 3, N, dtype=torch.float64))
    assert taps["activations"].shape == (B, N, 20)


# Stochastic depth

FACTORS = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)  # (branch, sample)


@pytest.mark.parametrize("fused", [False, True])
def test_block_multiplies_what_each_branch_adds_to_each_sample(fused):
    params, x = random_params(layers.block_shapes(CONFIG)), random_input(3, N, D)
    p, y, (f, g) = as_numpy(params), x.numpy(), FACTORS.numpy()[..., None, None]
    y = y + f * numpy_attention(p["MultiHeadDotProductAttention_1"], numpy_layer_norm(p["LayerNorm_0"], y))
    y = y + g * numpy_mlp(p["MlpBlock_3"], numpy_layer_norm(p["LayerNorm_2"], y), "tanh")
    found = layers.block(params, x, CONFIG, fused=fused, branches=FACTORS)
    np.testing.assert_allclose(found.numpy(), y, rtol=1e-9)
    assert torch.equal(found[2], x[2])  # both branches dropped: the sample passes through as it is


def test_a_dropped_sample_s_gradient_is_the_residual_s_alone():
    params, x = random_params(layers.block_shapes(CONFIG)), random_input(3, N, D)
    y, vjp = torch.func.vjp(lambda p, x: layers.block(p, x, CONFIG, branches=FACTORS), params, x)
    only_last = torch.zeros_like(y)
    only_last[2] = random_input(N, D)
    of_params, of_x = vjp(only_last)
    assert torch.equal(of_x, only_last)
    assert all((leaf == 0).all() for leaf in tree.leaves(of_params))


def test_a_branch_without_factors_is_itself():
    x = random_input(B, N, D)
    assert layers.branch(x, None, 0) is x
