"""JSON files beside weights, as timm and transformers write them and as people change them: followed, or said."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitfn
from vitfn import preprocessing, weights
from vitfn.errors import InputError
from vitfn.preprocessing import Preprocessing

CONFIG = vitfn.ViTConfig(
    patch_size=8, image_size=32, hidden_size=64, num_layers=2, num_heads=2, mlp_dim=96, num_classes=3, gelu="erf"
)
OF_TRANSFORMERS = {"model_type": "vit", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OF_TIMM = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 2, "embed_dim": 64, "depth": 2}}


@pytest.fixture
def file(tmp_path):
    """A file without a description of its own, in a layout, and the JSON files that are to lie beside it."""

    def make(layout, model=CONFIG, **beside):
        weights.save(tmp_path / "own.safetensors", vitfn.init(model), model, layout=layout)
        state = load_file(tmp_path / "own.safetensors")
        (tmp_path / "own.safetensors").unlink()
        save_file(state, tmp_path / "model.safetensors")
        for name, content in beside.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path / "model.safetensors"

    return make


def said(path, caplog) -> str:
    caplog.clear()
    vitfn.load(path)
    return caplog.text


# Whose they are


@pytest.mark.parametrize(
    "other",
    [
        {"hidden_size": 1024},
        {"num_hidden_layers": 24},
        {"intermediate_size": 4096},
        {"patch_size": 16},
        {"num_channels": 1},
        {"model_type": "swin"},
        {"model_type": "dinov2"},
        {"architecture": "vit_tiny_patch16_224"},
    ],
    ids=str,
)
def test_a_config_of_another_model_is_left_alone_and_that_is_said(file, caplog, other):
    config = {**OF_TRANSFORMERS, "layer_norm_eps": 0.5, **other}
    path = file("huggingface", config=config, preprocessor_config={"image_mean": [0.1] * 3, "image_std": [0.1] * 3})
    found = weights.describe(path).config
    assert (found.layer_norm_eps, found.mean) == (1e-12, 0.5)
    assert "config.json beside it left alone: it is of another model (" in said(path, caplog)


@pytest.mark.parametrize("other", [{"embed_dim": 192}, {"depth": 12}, {"patch_size": 16}, {"in_chans": 1}], ids=str)
def test_timm_s_likewise(file, caplog, other):
    path = file("timm", config={**OF_TIMM, "model_args": {**OF_TIMM["model_args"], "num_heads": 8, **other}})
    assert weights.describe(path).config.num_heads != 8
    assert "it is of another model (" in said(path, caplog)


@pytest.mark.parametrize("content", [{}, {"learning_rate": 1}, [1], "text"], ids=str)
def test_what_says_nothing_of_a_model_is_passed_over(file, caplog, content):
    path = file("timm", config=content)
    assert "config.json" not in said(path, caplog)


# What they state


def test_only_what_is_really_assumed_is_said_once(file, caplog):
    stated = {**OF_TRANSFORMERS, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "image_size": 32}
    path = file("huggingface", config=stated)
    text = said(path, caplog)
    assert text.count("assumed pixels in [-1, 1]") == 1
    assert "heads" not in text
    assert "GELU" not in text
    (path.parent / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert "assumed" not in said(path, caplog)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"0": "a", "1": "b", "2": "c"}, ("a", "b", "c")),
        ({"1": "a", "2": "b", "3": "c"}, ("a", "b", "c")),
        ({"2": "c", "0": "a", "1": "b"}, ("a", "b", "c")),
        ({"0": 5, "1": None, "2": 1.5}, ("5", "None", "1.5")),
        ({"0": "a", "1": "b"}, None),
        ({"0": "a", "1": "b", "7": "c"}, None),
        ({"a": "b"}, None),
        (["a", "b", "c"], ("a", "b", "c")),
        (5, None),
    ],
    ids=str,
)
def test_class_names_by_number(file, caplog, names, expected):
    path = file("huggingface", config={**OF_TRANSFORMERS, "id2label": names})
    assert weights.describe(path).class_names == expected
    assert ("class names not followed: the head has 3 classes" in said(path, caplog)) == (expected is None)


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ({"global_pool": "avg"}, "global_pool='avg' for a model with a class token"),
        ({"global_pool": "map"}, "global_pool='map' for a model with a class token"),
        ({"model_args": {"act_layer": "quick_gelu"}}, "act_layer 'quick_gelu'"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "norm_layer='rmsnorm', which vitfn does not follow"),
        ({"model_args": {"final_norm": "x"}}, "final_norm='x', which vitfn does not follow"),
        ({"model_args": {"num_heads": "x"}}, "num_heads"),
        ({"model_args": {"img_size": [64, 64]}}, "shape"),
        ({"pretrained_cfg": {"mean": [1, 2]}}, "mean"),
        ({"pretrained_cfg": {"crop_pct": 1e-9}}, "a crop of 1e-09"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused_by_name(file, stated, reason):
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        weights.describe(file("timm", config={**OF_TIMM, **stated}))
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"image_size": 48}, "position"),
        ({"hidden_act": {}}, "hidden_act"),
    ],
    ids=str,
)
def test_transformers_likewise(file, stated, reason):
    with pytest.raises(InputError) as error:
        weights.describe(file("huggingface", config={**OF_TRANSFORMERS, **stated}))
    assert reason in str(error.value)


def test_another_activation_of_the_pooler_is_refused(file):
    config = vitfn.ViTConfig(**{**vars(CONFIG), "num_classes": 0, "representation_size": 64})
    with pytest.raises(InputError, match="pooler_act 'relu', expected tanh"):
        weights.describe(file("huggingface", config, config={**OF_TRANSFORMERS, "pooler_act": "relu"}))


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (24, 40), (48, 32)], ids=str)  # of (k - 1) x (k + 1) patches
def test_a_grid_that_is_not_square_is_asked_for_and_believed(file, size):
    config = vitfn.ViTConfig(**{**vars(CONFIG), "image_size": size})
    path = file("timm", config)
    with pytest.raises(InputError, match="--assume=image_size=HEIGHTxWIDTH"):
        weights.describe(path)
    assert vitfn.load(path, config)["cls"].shape == (1, 1, 64)
    arguments = {**OF_TIMM["model_args"], "img_size": list(size)}
    (path.parent / "config.json").write_text(json.dumps({**OF_TIMM, "model_args": arguments}))
    assert weights.describe(path).config.image_hw == size


@pytest.mark.parametrize("ratio", [(64, 32), (32, 64)], ids=str)
def test_the_ratio_of_the_config_asked_for_tells_a_grid(file, ratio):
    config = vitfn.ViTConfig(**{**vars(CONFIG), "image_size": ratio})
    path = file("timm", config)
    larger = vitfn.ViTConfig(**{**vars(CONFIG), "image_size": (ratio[0] * 2, ratio[1] * 2)})
    positions = vitfn.load(path, larger)["Transformer"]["posembed_input"]["pos_embedding"]
    own = load_file(path)["pos_embed"]
    assert positions.shape == (1, 8 * 16 + 1 if ratio == (64, 32) else 16 * 8 + 1, 64)
    assert torch.equal(positions[:, 0], own[:, 0])


# How images are made


@pytest.mark.parametrize(
    ("stated", "expected", "says"),
    [
        ({}, None, ()),
        ({"size": {"height": 32, "width": 32}, "resample": 2}, (1.0, "bilinear", False, True), ()),
        ({"size": 32, "resample": 3}, (1.0, "bicubic", False, True), ()),
        (
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
            (0.8, "bilinear", True, True),
            (),
        ),
        (
            {"size": 64, "crop_size": 32, "do_center_crop": True, "resample": 3},
            (0.5, "bicubic", True, True),
            (),
        ),
        (
            {"size": {"height": 40, "width": 40}, "crop_size": 32, "do_center_crop": True, "resample": 3},
            (0.8, "bicubic", False, True),
            (),
        ),
        (
            {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True, "resample": 1},
            (0.875, "bicubic", True, True),
            ("interpolation 'lanczos' is not followed", "is for 224x224 px: followed in proportion at 32x32"),
        ),
        ({"size": {"longest_edge": 32}}, None, ("size {'longest_edge': 32} is not followed",)),
        ({"do_resize": False, "size": 32}, None, ("do_resize false is not followed",)),
        ({"size": 32, "do_pad": True}, (1.0, "bilinear", False, True), ("do_pad is not followed",)),
        ({"size": 32, "crop_pct": 0.8}, (0.8, "bilinear", True, True), ()),
    ],
    ids=str,
)
def test_transformers_preprocessors(stated, expected, says):
    found = preprocessing.of_transformers(stated, (32, 32))
    assert found.preprocessing == (Preprocessing(*expected) if expected else None)
    assert len(found.said) == len(says)
    assert all(part in line for part, line in zip(says, found.said, strict=True))


@pytest.mark.parametrize(
    ("stated", "pixel", "expected"),
    [
        ({"image_mean": [0.5], "image_std": [0.25]}, 51.0, (0.2 - 0.5) / 0.25),
        ({"image_mean": 0.5, "image_std": 0.25}, 51.0, (0.2 - 0.5) / 0.25),
        ({"do_normalize": False}, 51.0, 0.2),
        ({"do_rescale": False, "do_normalize": False}, 51.0, 51.0),
        ({"do_rescale": False, "image_mean": [100], "image_std": [10]}, 51.0, (51 - 100) / 10),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1], "image_std": [1]}, 51.0, 51 / 127.5 - 1),
    ],
    ids=str,
)
def test_pixels_become_what_the_preprocessor_makes_of_them(stated, pixel, expected):
    fields = preprocessing.of_transformers(stated, (32, 32)).fields
    mean, std = (value[0] if isinstance(value, list) else value for value in (fields["mean"], fields["std"]))
    assert (pixel / 255 - mean) / std == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("stated", "expected", "says"),
    [
        ({}, None, ()),
        ({"crop_pct": 0.9, "interpolation": "bicubic"}, (0.9, "bicubic", True, False), ()),
        ({"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "squash"}, (1.0, "bilinear", False, False), ()),
        ({"crop_pct": 0.9, "crop_mode": "border"}, (0.9, "bicubic", True, False), ("crop_mode 'border'",)),
    ],
    ids=str,
)
def test_timm_s_preprocessing(stated, expected, says):
    found = preprocessing.of_timm(stated)
    assert found.preprocessing == (Preprocessing(*expected) if expected else None)
    assert all(part in line for part, line in zip(says, found.said, strict=True))


def test_the_preprocessing_is_kept_in_files_that_vitfn_writes(file, tmp_path):
    from vitfn import convert

    path = file("timm", config={**OF_TIMM, "pretrained_cfg": {"crop_pct": 0.9, "interpolation": "bicubic"}})
    for name in ("a.npz", "b.safetensors"):
        assert convert.main(["convert", str(path), str(tmp_path / "out" / name)]) != 0  # there is no such folder
        assert convert.main(["convert", str(path), str(tmp_path / name)]) == 0
        assert weights.details(tmp_path / name).preprocessing == Preprocessing(0.9, "bicubic")
        path = tmp_path / name


@pytest.mark.parametrize(
    "said",
    [{"fraction": 1e-9}, {"fraction": "x"}, {"interpolation": "lanczos"}, {"down": 5}, {"other": 1}, [1]],
    ids=str,
)
def test_a_preprocessing_that_no_vitfn_writes_is_refused(tmp_path, said):
    vitfn.save(path := tmp_path / "a.npz", vitfn.init(CONFIG), CONFIG)
    with zipfile.ZipFile(path, "a") as archive:
        comment = json.loads(archive.comment)
        comment["vitfn"]["preprocessing"] = said
        archive.comment = json.dumps(comment).encode()
    with pytest.raises(InputError, match="found no description of a model that this version can read"):
        weights.details(path)


def test_a_grey_model_of_a_family_with_colours_gets_their_average(file):
    grey = vitfn.ViTConfig(**{**vars(CONFIG), "channels": 1})
    found = weights.describe(file("torchvision", grey)).config
    assert (found.channels, found.mean, found.std) == (1, pytest.approx(0.449), pytest.approx(0.226))


# A folder of the hub, and its shards


def test_a_whole_folder_is_read(file):
    path = file("huggingface", config=OF_TRANSFORMERS)
    assert weights.describe(path.parent) == weights.describe(path)
    assert weights.find(str(path.parent)) == (str(path), {})
    path.rename(path.with_name("pytorch_model.bin"))
    assert weights.describe(path.parent).config.num_heads == 2


def shards(path) -> None:
    state = sorted(load_file(path).items())
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, (state[:20], state[20:]), strict=True):
        save_file(dict(part), path.with_name(name))
    index = {"metadata": {}, "weight_map": {name: names[i >= 20] for i, (name, _) in enumerate(state)}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_read_as_one(file):
    path = file("huggingface", config=OF_TRANSFORMERS)
    whole = vitfn.tree.flatten(vitfn.load(path))
    shards(path)
    path.unlink()
    for given in (path.parent, path.with_name("model.safetensors.index.json")):
        found = vitfn.tree.flatten(vitfn.load(given))
        assert all(torch.equal(leaf, found[name]) for name, leaf in whole.items())
    with pytest.raises(InputError, match="a part of a sharded model"):
        vitfn.load(path.with_name("model-00001-of-00002.safetensors"))
    path.with_name("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="00002-of-00002"):
        vitfn.load(path.parent)


@pytest.mark.parametrize("where", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", 5])
def test_an_index_names_files_of_its_own_folder(file, where):
    path = file("huggingface", config=OF_TRANSFORMERS)
    index = path.with_name("x.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": where}}))
    with pytest.raises(InputError, match="no index of sharded weights"):
        vitfn.load(index)
