"""What a model looks at: closed forms, loops over single numbers, and finite differences."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SMALL

import vitfn
from vitfn import layers, maps, tree

GAP = dataclasses.replace(SMALL, classifier="gap")
MAP = dataclasses.replace(SMALL, classifier="map")
OBLONG = dataclasses.replace(SMALL, image_size=(16, 40))


def model(config: vitfn.ViTConfig) -> dict:
    generator = torch.Generator().manual_seed(0)
    return tree.map(lambda leaf: leaf + 0.2 * torch.randn(leaf.shape, generator=generator), vitfn.init(config))


def images(config: vitfn.ViTConfig, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, config.channels, *config.image_hw, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def random_weights() -> torch.Tensor:
    """(L, B, H, N, N), rows that add up to one."""
    return torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(2)).softmax(-1)


def test_rollout_of_tokens_that_look_at_themselves_is_the_identity():
    weights = torch.eye(5).expand(3, 2, 4, 5, 5)
    torch.testing.assert_close(maps.rollout(weights), torch.eye(5).expand(2, 5, 5))


def test_rollout_is_a_product_over_the_layers_of_the_mean_head_and_the_residual(random_weights):
    for image in range(2):
        wanted = np.eye(5)
        for layer in random_weights[:, image].double().numpy():
            mixed = layer.mean(0) + np.eye(5)
            wanted = (mixed / mixed.sum(-1, keepdims=True)) @ wanted
        np.testing.assert_allclose(maps.rollout(random_weights)[image].numpy(), wanted, rtol=1e-5)
    torch.testing.assert_close(maps.rollout(random_weights).sum(-1), torch.ones(2, 5))


def test_relevance_adds_what_attention_and_gradient_agree_on(random_weights):
    gradients = torch.randn(random_weights.shape, generator=torch.Generator().manual_seed(3))
    for image in range(2):
        wanted = np.eye(5)
        for layer, gradient in zip(random_weights[:, image].numpy(), gradients[:, image].numpy(), strict=True):
            wanted = wanted + np.maximum(layer * gradient, 0).mean(0) @ wanted
        np.testing.assert_allclose(maps.relevance(random_weights, gradients)[image].numpy(), wanted, rtol=1e-5)
    nothing = maps.relevance(random_weights, -random_weights)  # all gradients against the class
    torch.testing.assert_close(nothing, torch.eye(5).expand(2, 5, 5))


@pytest.mark.parametrize("config", [SMALL, GAP, MAP, OBLONG], ids=["token", "gap", "map", "oblong"])
def test_the_parts_of_the_tokens_add_up_to_the_result(config):
    params, x = model(config), images(config)
    logits, weights, part = maps.attend(params, x, config)
    torch.testing.assert_close(logits, vitfn.apply(params, x, config), rtol=1e-5, atol=1e-5)
    tokens = config.num_tokens
    assert [w.shape for w in weights] == [(2, 3, tokens, tokens)] * 3
    torch.testing.assert_close(part.sum(-1), torch.ones(2))
    if config.classifier == "token":
        assert part[:, 0].tolist() == [1, 1]
    if config.classifier == "gap":
        assert part.unique().tolist() == pytest.approx([1 / tokens])
    if config.classifier == "map":  # a probe that asks nothing sees all alike
        params["MAPHead_0"]["MultiHeadDotProductAttention_0"]["query"] = tree.map(
            torch.zeros_like, params["MAPHead_0"]["MultiHeadDotProductAttention_0"]["query"]
        )
        torch.testing.assert_close(maps.attend(params, x, config)[2], torch.full((2, tokens), 1 / tokens))


@pytest.mark.parametrize("config", [SMALL, MAP], ids=["token", "map"])
def test_the_gradients_are_those_of_a_logit_for_the_weights(config, monkeypatch):
    params, x = tree.to(model(config), torch.float64), images(config, 1).double()
    _, weights, gradients, _ = maps.explain(params, x, config, label=4)
    assert weights.shape == gradients.shape == (3, 1, 3, config.num_tokens, config.num_tokens)
    plain, seen = layers.dropout, []

    def nudged(at: tuple[int, ...], step: float) -> float:
        """The logit with one weight of one layer changed; attention's weights are what dropout gets with a shape."""
        seen.clear()

        def dropout(x, rate, keys, shape=None):
            if shape is not None:
                if len(seen) == at[0]:
                    x = x.clone()
                    x[at[1:]] += step
                seen.append(1)
            return plain(x, rate, keys, shape)

        monkeypatch.setattr(layers, "dropout", dropout)
        captured: dict = {}
        logits = vitfn.vit.forward(params, x, config, captured=captured)
        monkeypatch.setattr(layers, "dropout", plain)
        return float(logits[0, 4])

    for at in ((0, 0, 1, 2, 3), (1, 0, 2, 0, 5), (2, 0, 0, 0, 1)):
        slope = (nudged(at, 1e-4) - nudged(at, -1e-4)) / 2e-4
        assert float(gradients[at]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_without_a_class_each_image_s_likeliest_is_explained():
    params, x = model(SMALL), 3 * images(SMALL, 12)
    found = maps.explain(params, x, SMALL)
    torch.testing.assert_close(found.logits, vitfn.apply(params, x, SMALL), atol=1e-5, rtol=1e-5)
    assert len(set(found.logits.argmax(-1).tolist())) > 1
    for i, label in enumerate(found.logits.argmax(-1).tolist()):
        alone = maps.explain(params, x[i : i + 1], SMALL, label)
        torch.testing.assert_close(found.gradients[:, i], alone.gradients[:, 0], atol=1e-6, rtol=1e-4)


def test_tokens_lie_where_their_patches_do():
    h, w = OBLONG.grid
    assert (h, w) == (2, 5)
    tokens = torch.arange(OBLONG.num_tokens)
    assert maps.on_grid(tokens, OBLONG).tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert maps.on_grid(torch.arange(16), GAP)[0].tolist() == [0, 1, 2, 3]


def test_distances_are_in_pixels():
    n = OBLONG.num_tokens
    own = torch.eye(n).expand(2, 1, 3, n, n)
    assert maps.distances(own, OBLONG).tolist() == [[0, 0, 0]] * 2
    right = torch.zeros(n, n)  # each patch looks at the next one, those of the last column and the class token nowhere
    for row in range(2):
        for column in range(5):
            right[1 + 5 * row + column, 1 + 5 * row + (column + 1) % 5] = 1
    mean = (4 * 8 + 32) / 5  # patches of 8 pixels; the last one looks back over four
    torch.testing.assert_close(maps.distances(right.expand(1, 1, 1, n, n), OBLONG), torch.tensor([[mean]]))


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(GAP, posemb="sincos2d")], ids=["learned", "fixed"])
def test_positions_are_like_themselves_and_symmetric(config):
    params = model(config)
    found = maps.position_similarity(params, config).flatten(2).flatten(0, 1)
    torch.testing.assert_close(found.diagonal(), torch.ones(16))
    torch.testing.assert_close(found, found.T)
    if config.posemb == "learn":
        p = params["Transformer"]["posembed_input"]["pos_embedding"][0, 1:]
        assert float(found[3, 7]) == pytest.approx(float(p[3] @ p[7] / p[3].norm() / p[7].norm()), abs=1e-6)


def test_filters_are_the_directions_in_which_they_differ():
    """All filters are mixtures of two patterns at right angles, the first the stronger."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.linalg.qr(torch.randn(8 * 8 * 3, 2, generator=generator)).Q.T
    mixture = torch.randn(48, 2, generator=generator)
    mixture = torch.linalg.qr(mixture - mixture.mean(0)).Q * torch.tensor([5.0, 1.0])
    kernel = (mixture @ patterns).T.unflatten(0, (8, 8, 3))  # (P, P, C, D)
    found = maps.filters({"embedding": {"kernel": kernel}}, 2)
    assert found.shape == (2, 8, 8, 3)
    for one, pattern in zip(found.flatten(1), patterns, strict=True):
        assert one.min() == 0
        assert one.max() == 1
        assert abs(float(torch.corrcoef(torch.stack([one, pattern]))[0, 1])) == pytest.approx(1, abs=1e-4)
    assert len(maps.filters({"embedding": {"kernel": torch.randn(2, 2, 1, 48)}})) == 4  # fewer than are asked for


def test_a_stem_has_filters_too():
    config = dataclasses.replace(SMALL, patch_size=1, resnet=vitfn.ResNetConfig((1, 1), 0.5))
    assert maps.filters(vitfn.init(config)).shape == (28, 7, 7, 3)
