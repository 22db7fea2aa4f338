"""Google's files of every generation: big_vision's against its own numbers, and old layouts as it repairs them."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from conftest import REFERENCE, SMALL, expected, nchw

import vitfn
from vitfn import tree, weights
from vitfn.errors import InputError

POSITIONS = "Transformer/posembed_input/pos_embedding"
MODELS = {
    "bv_map": dataclasses.replace(SMALL, classifier="map"),
    "bv_gap_sincos": dataclasses.replace(SMALL, classifier="gap", posemb="sincos2d"),
    "bv_tok_rep": dataclasses.replace(SMALL, representation_size=48),
    "bv_scan": dataclasses.replace(SMALL, classifier="gap"),
}
LAYOUTS = {"bv_scan": "big_vision_scan"}


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def assert_same(found: dict, params: dict) -> None:
    found, params = tree.flatten(found), tree.flatten(params)
    assert found.keys() == params.keys()
    for path, leaf in params.items():
        assert torch.equal(found[path], leaf), path


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_big_vision_gives_its_logits(name):
    params, reference = vitfn.load_npz(REFERENCE / f"{name}.npz", MODELS[name]), expected(name)
    logits = vitfn.apply(params, nchw(reference["images"]), MODELS[name])
    assert np.abs(logits.detach().numpy() - reference["logits"]).max() < 5e-6


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_big_vision_is_described_by_its_shapes(name):
    size = 224 if MODELS[name].posemb == "sincos2d" else 32  # fixed positions tell nothing of the image
    assert weights.describe(REFERENCE / f"{name}.npz").config == dataclasses.replace(
        MODELS[name], name="ViT", image_size=size
    )


@pytest.mark.parametrize(("name", "prefix"), [("bv_map", "params"), ("bv_gap_sincos", ""), ("bv_tok_rep", "opt/target"),
                                              ("bv_scan", "params")])  # fmt: skip
def test_written_again_a_file_is_the_same_to_the_bit(tmp_path, name, prefix):
    params = vitfn.load_npz(REFERENCE / f"{name}.npz", MODELS[name])
    path = tmp_path / "a.npz"
    vitfn.save_npz(f"{path}:{prefix}", params, MODELS[name], layout=LAYOUTS.get(name, "big_vision"))
    with np.load(path) as file:
        found = dict(file)
    original = arrays(name)
    assert found.keys() == original.keys()
    for key, array in original.items():
        assert found[key].dtype == array.dtype
        assert found[key].tobytes() == array.tobytes(), key
    assert_same(vitfn.load(path), params)


def test_big_vision_s_files_are_under_params_by_default(tmp_path):
    params = vitfn.load_npz(REFERENCE / "bv_map.npz", MODELS["bv_map"])
    vitfn.save(tmp_path / "a.npz", params, layout="big_vision")
    with np.load(tmp_path / "a.npz") as file:
        assert set(file) == set(arrays("bv_map"))


@pytest.mark.parametrize("layout", weights.LAYOUTS)
def test_a_class_token_without_position_survives_every_layout(tmp_path, layout):
    """Its slot is minus zero, which changes no number it is added to, not even minus zero."""
    config = dataclasses.replace(SMALL, num_classes=0) if layout.startswith("huggingface") else SMALL
    original = {key: array for key, array in arrays("bv_tok_rep").items() if "pre_logits" not in key}
    original["opt/target/cls"][0, 0, :3] = -0.0
    np.savez(tmp_path / "a.npz", **original)
    params = vitfn.load_npz(tmp_path / "a.npz", config)
    vitfn.save(tmp_path / "b.npz", params, config, layout=layout)
    vitfn.save_npz(tmp_path / "c.npz", vitfn.load(tmp_path / "b.npz"), layout="big_vision")
    with np.load(tmp_path / "c.npz") as file:
        for name in ("cls", "pos_embedding"):
            assert file[f"params/{name}"].tobytes() == original[f"opt/target/{name}"].tobytes()


# Old and odd files


def renamed(name: str, *replacements: tuple[str, str]) -> dict[str, np.ndarray]:
    changed = {}
    for key, array in arrays(name).items():
        for pattern, replacement in replacements:
            key = re.sub(pattern, replacement, key)
        changed[key] = array
    return changed


PRE_LINEN = [
    (r"(block_\d+)/LayerNorm_1", r"\1/LayerNorm_2"),
    (r"(block_\d+)/MultiHeadDotProductAttention_0", r"\1/MultiHeadDotProductAttention_1"),
    (r"(block_\d+)/MlpBlock_0", r"\1/MlpBlock_3"),
]


@pytest.mark.parametrize(
    ("name", "replacements"),
    [
        ("bv_map", [("^params/", "")]),
        ("bv_map", [("^params/", "opt/target/")]),
        ("bv_map", [("^params/", "params/img/")]),
        ("bv_map", [("^params/", "some/where/else/")]),
        ("bv_map", PRE_LINEN),
        ("bv_map", [("pos_embedding", "Transformer/posembed_input/pos_embedding")]),
        ("bv_map", [("pos_embedding", "Transformer/pos_embedding")]),
        ("bv_map", [("MAPHead_0/", "")]),
        ("bv_map", [*PRE_LINEN, ("MAPHead_0/", ""), ("^params/LayerNorm_0", "params/LayerNorm_2")]),
        ("bv_tok_rep", PRE_LINEN),
        ("bv_scan", [("^params/", "")]),
    ],
)
def test_every_generation_is_read_as_the_newest(tmp_path, name, replacements):
    changed = renamed(name, *replacements)
    assert changed.keys() != arrays(name).keys()
    np.savez(tmp_path / "a.npz", **changed)
    loaded = vitfn.load_npz(tmp_path / "a.npz", MODELS[name])
    assert_same(loaded, vitfn.load_npz(REFERENCE / f"{name}.npz", MODELS[name]))


def test_positions_with_a_slot_for_the_class_token_stay_apart(tmp_path):
    changed = renamed("bv_tok_rep", ("^opt/target/", ""))
    slot = np.full((1, 1, 48), 0.5, np.float32)
    changed["pos_embedding"] = np.concatenate([slot, changed["pos_embedding"]], axis=1)
    np.savez(tmp_path / "a.npz", **changed)
    config = MODELS["bv_tok_rep"]
    flat = tree.flatten(vitfn.load_npz(tmp_path / "a.npz", config))
    assert flat[POSITIONS].shape == (1, 17, 48)
    assert torch.equal(flat[POSITIONS][:, :1], torch.from_numpy(slot))
    vitfn.save_npz(tmp_path / "b.npz", tree.unflatten(flat), layout="big_vision")  # which has no such slot
    again = vitfn.load_npz(tmp_path / "b.npz", config)
    assert torch.equal(again["cls"], flat["cls"] + 0.5)


def test_an_optimizer_s_state_is_left_aside_and_said(tmp_path, caplog):
    state = {
        "opt/0/count": np.array(7),
        "opt/0/mu/embedding/kernel": np.zeros((8, 8, 3, 48), np.float32),
        "opt/0/mu/cls": np.zeros((1, 1, 48), np.float32),
        "chrono/accum_train_time": np.array(1.5),
    }
    np.savez(tmp_path / "a.npz", **arrays("bv_map"), **state)
    loaded = vitfn.load_npz(tmp_path / "a.npz", MODELS["bv_map"])
    assert_same(loaded, vitfn.load_npz(REFERENCE / "bv_map.npz", MODELS["bv_map"]))
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "chrono, opt (4 arrays) ignored: no part of the model",
    ]


@pytest.mark.parametrize("subtree", ["params/a", "a", "a/", "params/a/"])
def test_a_part_of_a_file_is_read_by_its_name(tmp_path, subtree):
    two = {key.replace("params/", "params/a/"): array for key, array in arrays("bv_map").items()}
    two |= {key.replace("params/", "params/b/"): 2 * array for key, array in arrays("bv_map").items()}
    np.savez(tmp_path / "a.npz", **two)
    loaded = vitfn.load_npz(f"{tmp_path / 'a.npz'}:{subtree}", MODELS["bv_map"])
    assert_same(loaded, vitfn.load_npz(REFERENCE / "bv_map.npz", MODELS["bv_map"]))


def test_a_part_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"token.npz:txt: found arrays .* under txt/"):
        vitfn.load_npz(f"{REFERENCE / 'token.npz'}:txt")


def test_the_image_tower_is_found_beside_a_text_tower(tmp_path):
    two = {key.replace("params/", "params/img/"): array for key, array in arrays("bv_map").items()}
    two |= {"params/txt/Embed_0/embedding": np.zeros((9, 4), np.float32), "params/t": np.zeros(1, np.float32)}
    np.savez(tmp_path / "a.npz", **two)
    loaded = vitfn.load_npz(tmp_path / "a.npz", MODELS["bv_map"])
    assert_same(loaded, vitfn.load_npz(REFERENCE / "bv_map.npz", MODELS["bv_map"]))


def test_bfloat16_leaves_are_raw_two_byte_voids(tmp_path):
    changed = arrays("bv_map")
    for name in ("params/pos_embedding", "params/MAPHead_0/probe"):
        half = torch.from_numpy(changed[name]).bfloat16()
        changed[name] = half.view(torch.int16).numpy().view("V2")
    np.savez(tmp_path / "a.npz", **changed)
    loaded = tree.flatten(vitfn.load_npz(tmp_path / "a.npz", MODELS["bv_map"]))
    original = tree.flatten(vitfn.load_npz(REFERENCE / "bv_map.npz", MODELS["bv_map"]))
    for path, leaf in original.items():
        rounded = leaf.bfloat16().float() if path in (POSITIONS, "MAPHead_0/probe") else leaf
        assert torch.equal(loaded[path], rounded), path


def test_a_scan_of_absurd_depth_is_refused(tmp_path):
    changed = renamed("bv_scan", ("^params/", ""))
    changed["Transformer/encoderblock/LayerNorm_0/scale"] = np.zeros((100_000, 1), np.float32)
    np.savez(tmp_path / "a.npz", **changed)
    with pytest.raises(InputError, match="Transformer/encoderblock/LayerNorm_0/scale"):
        vitfn.load_npz(tmp_path / "a.npz", MODELS["bv_scan"])


@pytest.mark.parametrize("shape", [(64,), (1, 1, 1, 64)])
def test_group_norms_are_read_in_both_shapes(tmp_path, shape):
    config = dataclasses.replace(SMALL, patch_size=1, resnet=vitfn.ResNetConfig())
    params = vitfn.init(config, 3)
    flat = {path: leaf.numpy() for path, leaf in tree.flatten(params).items()}
    flat |= {f"gn_root/{name}": flat[f"gn_root/{name}"].reshape(shape) for name in ("scale", "bias")}
    np.savez(tmp_path / "a.npz", **flat)
    assert_same(vitfn.load_npz(tmp_path / "a.npz"), params)
    for layout, written in (("original", (1, 1, 1, 64)), ("linen", (64,))):
        vitfn.save_npz(tmp_path / "b.npz", params, layout=layout)
        with np.load(tmp_path / "b.npz") as file:
            assert file["gn_root/scale"].shape == written


# The mathematics that only big_vision has


def test_sincos2d_is_its_closed_form():
    config = dataclasses.replace(MODELS["bv_gap_sincos"], image_size=(24, 40))
    positions = vitfn.vit.sincos2d(config, torch.empty(0))[0].reshape(3, 5, 4, 12).double().numpy()
    omega = 10000.0 ** -(np.arange(12) / 11)
    for row in range(3):
        for column in range(5):
            expected = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
            np.testing.assert_allclose(positions[row, column], expected, atol=1e-6)


def test_the_attention_head_is_multi_head_attention_of_a_probe():
    """Against torch's own nn.MultiheadAttention."""
    config, generator = MODELS["bv_map"], torch.Generator().manual_seed(0)
    params = tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator) / 7, vitfn.init(config)["MAPHead_0"])
    x = torch.randn(2, 16, 48, generator=generator)
    attention, mlp = params["MultiHeadDotProductAttention_0"], params["MlpBlock_0"]
    module = torch.nn.MultiheadAttention(48, 3, batch_first=True)
    names = ("query", "key", "value")
    module.in_proj_weight.data = torch.cat([attention[name]["kernel"].flatten(1).T for name in names])
    module.in_proj_bias.data = torch.cat([attention[name]["bias"].flatten() for name in names])
    module.out_proj.weight.data = attention["out"]["kernel"].flatten(0, 1).T
    module.out_proj.bias.data = attention["out"]["bias"]
    y = module(params["probe"].expand(2, -1, -1), x, x)[0][:, 0]
    z = torch.nn.functional.layer_norm(y, (48,), params["LayerNorm_0"]["scale"], params["LayerNorm_0"]["bias"], 1e-6)
    z = torch.nn.functional.gelu(z @ mlp["Dense_0"]["kernel"] + mlp["Dense_0"]["bias"], approximate="tanh")
    expected = y + z @ mlp["Dense_1"]["kernel"] + mlp["Dense_1"]["bias"]
    torch.testing.assert_close(vitfn.layers.map_head(params, x, config), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_flow_into_every_leaf(name):
    config, images = MODELS[name], nchw(expected(name)["images"])
    params = vitfn.load_npz(REFERENCE / f"{name}.npz", config)
    grads = torch.func.grad(lambda params: vitfn.apply(params, images, config).square().sum())(params)
    for path, grad in tree.flatten(grads).items():
        assert grad.isfinite().all()
        assert grad.any() or path.endswith("key/bias"), path
