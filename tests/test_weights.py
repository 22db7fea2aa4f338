"""Weight files: both generations of Google's, against the outputs of Google's own code, and vitfn's own."""

import dataclasses
import json
import logging
import math
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE, SMALL, expected, nchw
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import vitfn
from vitfn import adapt, checkpoint, tree, weights
from vitfn.archive import write_archive
from vitfn.config import model_names
from vitfn.errors import InputError

POSITIONS = "Transformer/posembed_input/pos_embedding"
BLOCK = "Transformer/encoderblock_0"
PRE_LOGITS = dataclasses.replace(SMALL, representation_size=40)
GAP = dataclasses.replace(SMALL, classifier="gap")
MODELS = {"token": SMALL, "token_linen": SMALL, "pre_logits": PRE_LOGITS, "gap": GAP}


def arrays(name: str = "token") -> dict[str, np.ndarray]:
    """A reference model as np.load has it."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def write(path: Path, changes: dict[str, np.ndarray | None] | None = None, comment: bytes = b"") -> Path:
    """The reference model `token` with arrays replaced, added or, for None, left out."""
    kept = {name: array for name, array in (arrays() | (changes or {})).items() if array is not None}
    write_archive(path, ((name, torch.from_numpy(array)) for name, array in kept.items()), comment)
    return path


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def random_params(config: vitfn.ViTConfig, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return tree.unflatten({n: torch.randn(shape, generator=generator) for n, shape in vitfn.shapes(config).items()})


class Headers:
    """An open file of which only the shapes exist: the numbers of H/14 are 2.5 GB."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.path, self.kind, self.comment, self.shapes = "a.npz", "npz", b"", shapes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def assert_equal(found: dict, params: dict) -> None:
    found, params = tree.flatten(found), tree.flatten(params)
    assert list(found) == list(params)
    for path, leaf in params.items():
        assert found[path].dtype == torch.float32
        assert torch.equal(found[path], leaf), path


def logits_error(params: dict, images: np.ndarray, logits: np.ndarray, config: vitfn.ViTConfig) -> float:
    with torch.no_grad():
        return np.abs(vitfn.apply(params, nchw(images), config).numpy() - logits).max()


def refusal(function, path, *args) -> str:
    with pytest.raises(InputError) as error:
        function(path, *args)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


@pytest.fixture
def log(caplog):
    """The messages that vitfn logs while the test runs."""
    with caplog.at_level(logging.INFO, logger="vitfn"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "vitfn"]


# Google's files


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_the_logits_of_jax(name, log):
    params, reference = vitfn.load_npz(REFERENCE / f"{name}.npz", MODELS[name]), expected(name)
    assert log() == []
    assert logits_error(params, reference["images"], reference["logits"], MODELS[name]) < 5e-6


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_tree_has_the_paths_shapes_and_numbers_of_the_file(name):
    flat = tree.flatten(vitfn.load_npz(REFERENCE / f"{name}.npz", MODELS[name]))
    assert {path: tuple(leaf.shape) for path, leaf in flat.items()} == vitfn.shapes(MODELS[name])
    assert list(flat) == list(vitfn.shapes(MODELS[name]))
    for path, array in arrays(name).items():
        path = re.sub("LayerNorm_1", "LayerNorm_2", path)
        path = re.sub("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1", path)
        path = re.sub("MlpBlock_0", "MlpBlock_3", path)
        np.testing.assert_array_equal(flat[path].numpy(), array)


def test_both_layouts_load_to_the_same_tree():
    old = vitfn.load_npz(REFERENCE / "token.npz", SMALL)
    assert_equal(vitfn.load_npz(REFERENCE / "token_linen.npz", SMALL), old)


def test_leaves_own_aligned_contiguous_writable_memory():
    leaves = tree.leaves(vitfn.load_npz(REFERENCE / "token.npz", dataclasses.replace(SMALL, image_size=48)))
    assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)
    for leaf in leaves:
        assert leaf.data_ptr() % 64 == 0
        assert leaf.is_contiguous()
        assert leaf.untyped_storage().nbytes() == 4 * leaf.numel()
        assert not leaf.requires_grad
        leaf.zero_()


# Position embeddings for another grid


@pytest.mark.parametrize("size", [48, 24])
def test_resized_positions_and_logits_are_those_of_jax(size, log):
    config, reference = dataclasses.replace(SMALL, image_size=size), expected("token_resized")
    params = vitfn.load_npz(REFERENCE / "token.npz", config)
    positions = tree.flatten(params)[POSITIONS].numpy()
    assert np.abs(positions - reference[f"pos_embedding_{size}"]).max() < 1e-6
    assert logits_error(params, reference[f"images_{size}"], reference[f"logits_{size}"], config) < 5e-6
    (message,) = log()
    assert f"resized from 4x4 to {size // 8}x{size // 8} patches" in message


def zoomed(grid: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """What Google's checkpoint.py does to a grid (rows, columns, D)."""
    return ndimage.zoom(grid, (new[0] / grid.shape[0], new[1] / grid.shape[1], 1), order=1)


SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=100)
@given(old=SIDES, new=SIDES, extra=st.integers(0, 1), seed=st.integers(0, 99))
def test_resized_positions_are_those_of_scipy(old, new, extra, seed):
    positions = np.random.default_rng(seed).standard_normal((1, extra + math.prod(old), 3))
    resized = adapt.resize_positions(torch.from_numpy(positions), old, new).numpy()
    reference = zoomed(positions[0, extra:].reshape(*old, 3), new).reshape(-1, 3)
    assert resized.shape == (1, extra + math.prod(new), 3)
    np.testing.assert_array_equal(resized[:, :extra], positions[:, :extra])
    np.testing.assert_allclose(resized[0, extra:], reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((14, 14), (24, 24)),
        ((24, 24), (14, 14)),
        ((14, 14), (7, 7)),
        ((14, 14), (37, 37)),
        ((14, 14), (14, 10)),
        ((14, 14), (1, 1)),
        ((14, 14), (1, 20)),
        ((2, 8), (4, 4)),
    ],
)
def test_resized_positions_are_those_of_scipy_for_published_grids(old, new):
    positions = np.random.default_rng(0).standard_normal((1, 1 + math.prod(old), 5), dtype=np.float32)
    resized = adapt.resize_positions(torch.from_numpy(positions), old, new)
    reference = zoomed(positions[0, 1:].reshape(*old, 5).astype(np.float64), new).reshape(-1, 5)
    assert resized.dtype == torch.float32
    assert torch.equal(resized[0, :1], torch.from_numpy(positions[0, :1]))
    np.testing.assert_allclose(resized[0, 1:].numpy(), reference, rtol=1e-6, atol=1e-7)


def test_the_same_grid_changes_nothing():
    positions = torch.randn(1, 17, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adapt.resize_positions(positions, (4, 4), (4, 4)), positions)


def test_positions_of_a_gap_model_are_resized_without_a_class_token():
    config = dataclasses.replace(GAP, image_size=(48, 16))
    found = tree.flatten(vitfn.load_npz(REFERENCE / "gap.npz", config))[POSITIONS][0]
    reference = zoomed(arrays("gap")[POSITIONS][0].reshape(4, 4, 48).astype(np.float64), (6, 2)).reshape(12, 48)
    np.testing.assert_allclose(found.numpy(), reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("new", [(4, 4), (8, 2), (6, 3)])
def test_positions_of_a_non_square_grid_are_resized_from_it(tmp_path, new):
    """Also where both grids have the same number of patches."""
    wide = dataclasses.replace(SMALL, image_size=(16, 64))
    params = random_params(wide)
    vitfn.save_npz(tmp_path / "a.npz", params, wide)
    loaded = vitfn.load_npz(tmp_path / "a.npz", dataclasses.replace(SMALL, image_size=(8 * new[0], 8 * new[1])))
    positions = tree.flatten(params)[POSITIONS]
    assert torch.equal(tree.flatten(loaded)[POSITIONS], adapt.resize_positions(positions, (2, 8), new))


# Heads and pre_logits


def test_a_head_of_the_same_class_count_is_kept(log):
    head = vitfn.load_npz(REFERENCE / "token.npz", dataclasses.replace(SMALL, name="other"))["head"]
    np.testing.assert_array_equal(head["kernel"].numpy(), arrays()["head/kernel"])
    np.testing.assert_array_equal(head["bias"].numpy(), arrays()["head/bias"])
    assert head["kernel"].any()
    assert log() == []


def test_a_head_of_another_class_count_becomes_zeros(log):
    params = vitfn.load_npz(REFERENCE / "token.npz", dataclasses.replace(SMALL, num_classes=7))
    assert torch.equal(params["head"]["kernel"], torch.zeros(48, 7))
    assert torch.equal(params["head"]["bias"], torch.zeros(7))
    np.testing.assert_array_equal(params["cls"].numpy(), arrays()["cls"])
    (message,) = log()
    assert "head (48, 10) replaced by zeros (48, 7)" in message


def test_a_head_that_the_file_lacks_becomes_zeros(tmp_path, log):
    path = write(tmp_path / "a.npz", {"head/kernel": None, "head/bias": None})
    params = vitfn.load_npz(path, SMALL)
    assert torch.equal(params["head"]["kernel"], torch.zeros(48, 10))
    assert torch.equal(params["head"]["bias"], torch.zeros(10))
    (message,) = log()
    assert "head none replaced by zeros (48, 10)" in message


def test_pre_logits_is_dropped_where_the_config_has_none(log):
    params = vitfn.load_npz(REFERENCE / "pre_logits.npz", SMALL)
    assert list(tree.flatten(params)) == list(vitfn.shapes(SMALL))
    assert not params["head"]["kernel"].any()  # of 40 inputs in the file
    dropped, replaced = log()
    assert "pre_logits (48, 40) dropped" in dropped
    assert "head (40, 10) replaced by zeros (48, 10)" in replaced
    np.testing.assert_array_equal(params["cls"].numpy(), arrays("pre_logits")["cls"])


def test_pre_logits_is_kept_where_the_config_has_it(log):
    params = vitfn.load_npz(REFERENCE / "pre_logits.npz", PRE_LOGITS)
    np.testing.assert_array_equal(params["pre_logits"]["kernel"].numpy(), arrays("pre_logits")["pre_logits/kernel"])
    np.testing.assert_array_equal(params["head"]["kernel"].numpy(), arrays("pre_logits")["head/kernel"])
    assert log() == []


def test_pre_logits_that_the_file_lacks_is_missing():
    message = refusal(vitfn.load_npz, REFERENCE / "token.npz", PRE_LOGITS)
    assert "missing pre_logits/kernel (48, 40); missing pre_logits/bias (40,)" in message


# Arrays that do not fit


def test_missing_extra_and_misshapen_arrays_are_listed_up_to_three(tmp_path):
    path = write(
        tmp_path / "a.npz",
        {
            "cls": None,
            "extra/kernel": zeros(2, 3),
            f"{BLOCK}/LayerNorm_0/scale": zeros(47),
            f"{BLOCK}/MlpBlock_3/Dense_0/kernel": None,
        },
    )
    message = refusal(vitfn.load_npz, path, SMALL)
    assert message.count(";") == 3
    assert "missing cls (1, 1, 48)" in message
    assert f"missing {BLOCK}/MlpBlock_3/Dense_0/kernel (48, 96)" in message
    assert "extra extra/kernel (2, 3)" in message
    assert message.endswith("; and 1 more")
    path = write(tmp_path / "a.npz", {f"{BLOCK}/LayerNorm_0/scale": zeros(47)})
    assert f"{BLOCK}/LayerNorm_0/scale has shape (47,), expected (48,)" in refusal(vitfn.load_npz, path, SMALL)


def test_a_deeper_model_and_a_shallower_one_are_refused():
    deeper = refusal(vitfn.load_npz, REFERENCE / "token.npz", dataclasses.replace(SMALL, num_layers=4))
    assert deeper.count("missing Transformer/encoderblock_3/") == 3
    assert deeper.endswith("; and 13 more")
    assert "extra" not in deeper
    shallower = refusal(vitfn.load_npz, REFERENCE / "token.npz", dataclasses.replace(SMALL, num_layers=2))
    assert shallower.count("extra Transformer/encoderblock_2/") == 3
    assert "missing" not in shallower


def test_a_class_token_too_many_or_too_few_is_refused():
    assert "extra cls (1, 1, 48)" in refusal(vitfn.load_npz, REFERENCE / "token.npz", GAP)
    assert "missing cls (1, 1, 48)" in refusal(vitfn.load_npz, REFERENCE / "gap.npz", SMALL)


@pytest.mark.parametrize("shape", [(17, 48), (1, 17, 47), (2, 17, 48), (1, 17, 48, 1)])
def test_misshapen_positions_are_refused(tmp_path, shape):
    path = write(tmp_path / "a.npz", {POSITIONS: zeros(*shape)})
    assert f"{POSITIONS} has shape {shape}, expected (1, 17, 48)" in refusal(vitfn.load_npz, path, SMALL)


def test_a_layer_under_both_of_its_names_is_refused(tmp_path):
    path = write(tmp_path / "a.npz", {f"{BLOCK}/LayerNorm_1/scale": zeros(48)})
    assert "LayerNorm_1" in refusal(vitfn.load_npz, path, SMALL)


def test_a_line_break_in_an_array_s_name_stays_out_of_the_message(tmp_path):
    refusal(vitfn.load_npz, write(tmp_path / "a.npz", {"a\nb": zeros(3)}), SMALL)


def test_a_terminal_s_commands_in_an_array_s_name_stay_out_of_the_message(tmp_path):
    message = refusal(vitfn.load_npz, write(tmp_path / "a.npz", {"a\x1b[31mb": zeros(3)}), SMALL)
    assert "a?[31mb" in message


def test_what_is_no_archive_is_refused(tmp_path):
    for function in (weights.describe, vitfn.load_npz):
        refusal(function, tmp_path / "absent.npz")


def test_damaged_numbers_are_refused(tmp_path):
    path = write(tmp_path / "a.npz")
    whole = path.read_bytes()
    kernel = arrays()[f"{BLOCK}/MlpBlock_3/Dense_0/kernel"].tobytes()
    path.write_bytes(whole.replace(kernel, kernel[:-1] + bytes([kernel[-1] ^ 1])))
    assert f"{BLOCK}/MlpBlock_3/Dense_0/kernel" in refusal(vitfn.load_npz, path, SMALL)


# Saving


@pytest.mark.parametrize("layout", ["original", "linen"])
@pytest.mark.parametrize("config", [SMALL, GAP, PRE_LOGITS])
def test_save_and_load_are_bit_identical(tmp_path, layout, config):
    params = random_params(config)
    vitfn.save_npz(tmp_path / "a.npz", params, config, layout=layout)
    assert_equal(vitfn.load_npz(tmp_path / "a.npz"), params)
    vitfn.save_npz(tmp_path / "b.npz", params, layout=layout)
    assert_equal(vitfn.load_npz(tmp_path / "b.npz", config), params)


@pytest.mark.parametrize(("layout", "name"), [("original", "token"), ("linen", "token_linen")])
def test_saved_arrays_are_named_and_shaped_as_google_s(tmp_path, layout, name):
    params = vitfn.load_npz(REFERENCE / "token.npz", SMALL)
    vitfn.save_npz(tmp_path / "a.npz", params, SMALL, layout=layout)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        found = dict(file)
    reference = arrays(name)
    assert found.keys() == reference.keys()
    for path, array in reference.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array)


def test_the_same_model_is_the_same_bytes(tmp_path):
    for name in ("a.npz", "b.npz"):
        vitfn.save_npz(tmp_path / name, random_params(SMALL), SMALL, ["a"] * 10)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("config", [dataclasses.replace(SMALL, num_layers=2), GAP, PRE_LOGITS])
def test_a_tree_that_does_not_fit_the_config_is_not_saved(tmp_path, config):
    message = refusal(vitfn.save_npz, tmp_path / "a.npz", random_params(SMALL), config)
    assert re.search("missing|extra", message)
    assert not any(tmp_path.iterdir())


def test_a_misshapen_leaf_is_not_saved(tmp_path):
    params = random_params(SMALL)
    params["head"]["bias"] = torch.zeros(9)
    message = refusal(vitfn.save_npz, tmp_path / "a.npz", params, SMALL)
    assert "head/bias has shape (9,), expected (10,)" in message
    assert not any(tmp_path.iterdir())


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^layout: found 'flax', expected one of original, linen, big_vision,"):
        vitfn.save_npz(tmp_path / "a.npz", random_params(SMALL), SMALL, layout="flax")
    assert not any(tmp_path.iterdir())


# What a file says of itself


def test_config_and_class_names_survive(tmp_path):
    config = dataclasses.replace(
        SMALL,
        name="mine",
        image_size=(32, 64),
        representation_size=5,
        dropout_rate=0.1,
        attention_dropout_rate=0.2,
        gelu="erf",
        layer_norm_eps=1e-5,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )
    names = ["Katze", "собака", "鳥", 'a "quoted"\nname', *"abcdef"]
    vitfn.save_npz(tmp_path / "a.npz", random_params(config), config, names)
    assert weights.describe(tmp_path / "a.npz") == (config, tuple(names), True)
    assert hash(weights.describe(tmp_path / "a.npz").config) == hash(config)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_class_names_may_be_absent(tmp_path):
    vitfn.save_npz(tmp_path / "a.npz", random_params(SMALL), SMALL)
    assert weights.describe(tmp_path / "a.npz") == (SMALL, None, True)


def test_a_stated_config_is_used_without_a_word(tmp_path, log):
    config = dataclasses.replace(SMALL, image_size=(16, 64), gelu="erf")
    params = random_params(config)
    vitfn.save_npz(tmp_path / "a.npz", params, config)
    assert_equal(vitfn.load_npz(tmp_path / "a.npz"), params)
    assert log() == []


def test_class_names_beyond_64_kb_are_in_a_json_file_beside(tmp_path):
    names = [letter * 10_000 for letter in "abcdefghij"]
    params = random_params(SMALL)
    vitfn.save_npz(tmp_path / "model.npz", params, SMALL, names)
    assert {file.name for file in tmp_path.iterdir()} == {"model.npz", "model.json"}
    assert weights.describe(tmp_path / "model.npz") == (SMALL, tuple(names), True)
    assert_equal(vitfn.load_npz(tmp_path / "model.npz"), params)


def test_64_kb_of_description_are_still_in_the_file(tmp_path):
    path, params = tmp_path / "a.npz", random_params(SMALL)
    vitfn.save_npz(path, params, SMALL, [""] * 10)
    with zipfile.ZipFile(path) as file:
        room = 65535 - len(file.comment)
    vitfn.save_npz(path, params, SMALL, ["x" * room] + [""] * 9)
    assert len(list(tmp_path.iterdir())) == 1
    assert weights.describe(path).class_names[0] == "x" * room
    vitfn.save_npz(path, params, SMALL, ["x" * (room + 1)] + [""] * 9)
    assert len(list(tmp_path.iterdir())) == 2
    assert weights.describe(path).class_names[0] == "x" * (room + 1)


@pytest.mark.parametrize("beside", [None, b"", b"{}", b'{"vitfn": {}}', b"\xff", b"[" * 100_000])
def test_a_json_file_that_is_gone_or_damaged_is_named(tmp_path, beside):
    vitfn.save_npz(tmp_path / "a.npz", random_params(SMALL), SMALL, ["x" * 10_000] * 10)
    (tmp_path / "a.json").unlink() if beside is None else (tmp_path / "a.json").write_bytes(beside)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "a.json"))):
        weights.describe(tmp_path / "a.npz")
    assert_equal(vitfn.load_npz(tmp_path / "a.npz"), random_params(SMALL))  # the config is in the file itself


OTHERS = [
    b"",
    b"made by us",
    b"{}",
    b'{"a": 1}',
    b"[1, 2]",
    b'"vitfn"',
    b"null",
    b"7",
    b"\xff\xfe",
    b"{",
    b"[" * 60_000,
]


@pytest.mark.parametrize("comment", OTHERS, ids=lambda comment: repr(comment[:12]))
def test_somebody_else_s_comment_is_ignored(tmp_path, comment):
    path = write(tmp_path / "a.npz", comment=comment)
    config, class_names, stated = weights.describe(path)
    assert (config.hidden_size, class_names, stated) == (48, None, False)
    assert_equal(vitfn.load_npz(path), vitfn.load_npz(REFERENCE / "token.npz", SMALL))


def stating(**fields) -> bytes:
    config = json.loads(json.dumps(dataclasses.asdict(SMALL))) | fields
    return json.dumps({"vitfn": {"config": config, "class_names": None}}).encode()


BROKEN = {
    "null": b'{"vitfn": null}',
    "number": b'{"vitfn": 5}',
    "list": b'{"vitfn": []}',
    "string": b'{"vitfn": "file"}',
    "empty": b'{"vitfn": {}}',
    "no config": b'{"vitfn": {"class_names": null}}',
    "config a list": b'{"vitfn": {"config": [1], "class_names": null}}',
    "class names a number": b'{"vitfn": {"config": {}, "class_names": 5}}',
    "file a number": b'{"vitfn": {"file": 5}}',
    "file elsewhere": b'{"vitfn": {"file": "/etc/passwd"}}',
    "unknown field": stating(width=3),
    "line break": stating(**{"a\nb": 3}),
    "bad choice": stating(gelu="relu"),
    "size a string": stating(num_layers="3"),
    "size a fraction": stating(num_layers=2.5),
    "size a float": stating(num_layers=3.0),
    "no size": stating(patch_size=None),
    "image of three sides": stating(image_size=[32, 32, 3]),
    "negative width": stating(representation_size=-1),
    "width a string": stating(representation_size="x"),
    "not a probability": stating(dropout_rate=float("nan")),
}


@pytest.mark.parametrize("comment", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_description_is_refused(tmp_path, comment):
    path = write(tmp_path / "a.npz", comment=comment)
    refusal(weights.describe, path)
    refusal(vitfn.load_npz, path)


@pytest.mark.parametrize(
    "fields", [{"image_size": 64}, {"num_layers": 2}, {"hidden_size": 96}, {"classifier": "gap"}, {"num_classes": 7}]
)
def test_a_description_that_contradicts_the_arrays_is_refused(tmp_path, fields):
    """Its own head would be replaced by zeros, its own positions resized."""
    refusal(vitfn.load_npz, write(tmp_path / "a.npz", comment=stating(**fields)))


def test_a_description_that_contradicts_the_arrays_is_refused_where_positions_are_resized(tmp_path):
    path = write(tmp_path / "a.npz", comment=stating(image_size=64))
    refusal(vitfn.load_npz, path, dataclasses.replace(SMALL, image_size=48))


# What is inferred where a file says nothing


@pytest.mark.parametrize("name", MODELS)
def test_reference_files_are_described_by_their_shapes(name):
    config, class_names, stated = weights.describe(REFERENCE / f"{name}.npz")
    assert config == dataclasses.replace(MODELS[name], name="ViT")
    assert (class_names, stated) == (None, False)


def test_what_is_assumed_is_said(log):
    params = vitfn.load_npz(REFERENCE / "token.npz")
    assert_equal(params, vitfn.load_npz(REFERENCE / "token.npz", SMALL))
    (message,) = log()
    assert "does not state its config; assumed a square image, tanh GELU, LayerNorm epsilon 1e-06" in message


def test_a_published_model_is_recognised_in_its_file(tmp_path):
    config = vitfn.get_config("Ti/16")
    params = tree.unflatten({path: torch.zeros(shape) for path, shape in vitfn.shapes(config).items()})
    vitfn.save_npz(tmp_path / "a.npz", params)
    assert weights.describe(tmp_path / "a.npz") == (config, None, False)
    assert config.name == "ViT-Ti_16"


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize(
    "overrides", [{}, {"num_classes": 21_843, "representation_size": 768}, {"image_size": 448, "channels": 1}]
)
def test_every_published_model_is_recognised_by_its_shapes(monkeypatch, name, overrides):
    config = vitfn.get_config(name, **overrides)

    monkeypatch.setattr(checkpoint, "open_file", lambda path: Headers(vitfn.shapes(config)))
    assert weights.describe("a.npz") == (config, None, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding/kernel": None},
        {"embedding/kernel": zeros(192, 48)},
        {POSITIONS: None},
        {POSITIONS: zeros(17)},
        {POSITIONS: zeros(1, 15, 48)},
        {POSITIONS: zeros(1, 0, 48)},
        {f"{BLOCK}/MlpBlock_3/Dense_0/kernel": None},
        {f"{BLOCK}/MlpBlock_3/Dense_0/kernel": zeros()},
        {f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel": zeros(48, 48)},
        {f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel": zeros(48, 5, 9)},
        {f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel": zeros(48, 0, 9)},
        {"head/bias": zeros()},
        {"head/bias": zeros(0)},
        {"pre_logits/bias": zeros()},
    ],
    ids=lambda changes: " ".join(
        f"{name.split('/')[-2:]} {x if x is None else x.shape}" for name, x in changes.items()
    ),
)
def test_arrays_that_are_no_vision_transformer_are_refused(tmp_path, changes):
    path = write(tmp_path / "a.npz", changes)
    refusal(weights.describe, path)
    refusal(vitfn.load_npz, path)


def test_another_model_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", conv1=zeros(3, 3), fc=zeros(4))
    assert "found arrays (conv1, fc) that are not a plain Vision Transformer's" in refusal(
        weights.describe, tmp_path / "a.npz"
    )


# Memory

PEAK = """
    import re, sys
    import vitfn

    def kilobytes(name):
        with open("/proc/self/status") as file:
            return int(re.search(name + r":\\s+(\\d+) kB", file.read())[1])

    vitfn.load_npz(sys.argv[1])
    before = kilobytes("VmRSS")
    params = vitfn.load_npz(sys.argv[2])
    print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_file_is_loaded_in_hardly_more_memory_than_its_own(tmp_path):
    """The peak of a process above what it had when the load began.

    (Not getrusage's ru_maxrss, which a new process takes over from the one that started it.)
    """
    config = dataclasses.replace(SMALL, hidden_size=512, num_heads=8, num_layers=8, mlp_dim=2048)
    params = tree.unflatten({path: torch.ones(shape) for path, shape in vitfn.shapes(config).items()})
    vitfn.save_npz(tmp_path / "a.npz", params, config)
    size = (tmp_path / "a.npz").stat().st_size
    assert size > 100e6
    command = [sys.executable, "-c", textwrap.dedent(PEAK), REFERENCE / "token.npz", tmp_path / "a.npz"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 * size < int(done.stdout) < 1.2 * size


def test_a_misshapen_head_of_the_right_class_count_is_an_error(tmp_path):
    params = vitfn.init(SMALL, 0)
    params["head"]["kernel"] = torch.zeros(7, 10)
    vitfn.save_npz(tmp_path / "model.npz", params)
    with pytest.raises(InputError, match=r"head/kernel has shape \(7, 10\), expected \(48, 10\)"):
        vitfn.load_npz(tmp_path / "model.npz", SMALL)


def test_class_names_need_a_config_that_counts_as_many(tmp_path):
    with pytest.raises(InputError, match="class_names: found 10, expected a config"):
        vitfn.save_npz(tmp_path / "model.npz", vitfn.init(SMALL, 0), class_names="0123456789")
    with pytest.raises(InputError, match="class_names: found 3, expected 10"):
        vitfn.save_npz(tmp_path / "model.npz", vitfn.init(SMALL, 0), SMALL, class_names=["a", "b", "c"])


# Every layout


@st.composite
def configs(draw) -> vitfn.ViTConfig:
    heads, patch = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stem = draw(st.none() | st.builds(vitfn.ResNetConfig, st.lists(st.integers(1, 2), max_size=2), st.just(0.5)))
    stride = math.prod(stem.strides) if stem else 1
    return vitfn.ViTConfig(
        patch_size=patch,
        image_size=(grid[0] * patch * stride, grid[1] * patch * stride),
        channels=draw(st.sampled_from([1, 3, 5])),
        hidden_size=8 * heads,
        num_layers=draw(st.integers(1, 11)),
        num_heads=heads,
        mlp_dim=draw(st.integers(1, 9)),
        num_classes=draw(st.integers(0, 4)),
        classifier=draw(st.sampled_from(["token", "gap", "map"])),
        representation_size=draw(st.none() | st.integers(1, 5)),
        posemb=draw(st.sampled_from(["learn", "sincos2d"])),
        gelu=draw(st.sampled_from(["tanh", "erf"])),
        mean=draw(st.sampled_from([0.5, 0.25])),
        resnet=stem,
    )


@settings(max_examples=40)
@given(configs(), st.sampled_from(list(weights.LAYOUTS)), st.sampled_from(["npz", "safetensors"]))
def test_any_model_makes_the_round_trip_through_a_layout_or_is_refused(tmp_path_factory, config, layout, suffix):
    path = tmp_path_factory.mktemp("weights") / f"a.{suffix}"
    params = random_params(config)
    try:
        vitfn.save(path, params, config, layout=layout)
    except InputError as error:
        refused = str(error).startswith(f"layout={layout}: found ") and not path.exists()
    else:
        refused = False
    if refused:
        return
    found, loaded = weights.describe(path).config, vitfn.load(path)
    images = torch.rand(2, config.channels, *config.image_hw)
    with torch.no_grad():
        outputs, again = vitfn.apply(params, images, config), vitfn.apply(loaded, images, found)
    torch.testing.assert_close(again, outputs, atol=1e-4, rtol=1e-4)  # big_vision folds the class token's position
    fixed_made_learned = found.posemb != config.posemb
    folded = layout.startswith("big_vision") and config.classifier == "token"
    if not (fixed_made_learned or folded):
        assert found == config
        assert_equal(loaded, params)
