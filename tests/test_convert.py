"""python -m vitfn.convert and vitfn.inspect, from end to end; and the table of published files."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE, ROOT, SMALL

import vitfn
from vitfn import adapt, convert, inspect, tree, weights
from vitfn.command import EXIT_BROKEN_PIPE
from vitfn.published import npz_bytes, published

TOKEN = str(REFERENCE / "token.npz")


def run(capsys, command, *arguments) -> tuple[int, str, str]:
    code = command.main(["vitfn", *map(str, arguments)])
    return code, *capsys.readouterr()


def converted(capsys, *arguments) -> str:
    code, out, err = run(capsys, convert, *arguments)
    assert (code, err) == (0, "")
    return out


def refused(capsys, command, *arguments) -> str:
    code, out, err = run(capsys, command, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("vitfn: ")
    assert err.count("\n") == 1
    return err


def arrays(path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def assert_identical(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert (array.dtype, array.shape) == (b[name].dtype, b[name].shape), name
        assert array.tobytes() == b[name].tobytes(), name


# Convert


@pytest.mark.parametrize("layout", [name for name in weights.LAYOUTS if not name.startswith("big_vision")])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_through_every_layout_and_back_a_file_is_the_same_to_the_bit(tmp_path, capsys, layout, suffix):
    middle, back = tmp_path / f"a.{suffix}", tmp_path / "b.npz"
    out = converted(capsys, TOKEN, middle, f"--to={layout}")
    assert re.search(r"^from +.*token.npz \(npz, original\)$", out, re.M)
    assert re.search(rf"^to +.*a.{suffix} \({layout}, {middle.stat().st_size:,} bytes\)$", out, re.M)
    converted(capsys, middle, back)
    assert_identical(arrays(back), arrays(TOKEN))
    assert weights.describe(back).config.gelu == "tanh"  # what the file in between stated


@pytest.mark.parametrize(("suffix", "layout"), [("npz", "original"), ("safetensors", "timm")])
def test_the_layout_is_by_default_the_format_s_usual_one(tmp_path, capsys, suffix, layout):
    assert f"({layout}, " in converted(capsys, TOKEN, tmp_path / f"a.{suffix}")


def test_a_model_is_resized_on_the_way(tmp_path, capsys):
    path = tmp_path / "a.npz"
    out = converted(
        capsys,
        REFERENCE / "pre_logits.npz",
        path,
        "--img_size=48x24",
        "--num_classes=7",
        "--pre_logits=drop",
        "--channels=1",
    )
    changed = re.findall(r"^changed +(.*)$", out, re.M)
    assert changed == [
        "pre_logits (48, 40) dropped: the model has none",
        "head (40, 10) replaced by zeros (48, 7)",
        "position embeddings resized from 4x4 to 6x3 patches",
        "input channels: 3 made 1",
    ]
    config = weights.describe(path).config
    assert (config.image_hw, config.num_classes, config.representation_size, config.channels) == ((48, 24), 7, None, 1)
    params, original = vitfn.load(path), vitfn.load(REFERENCE / "pre_logits.npz")
    assert not params["head"]["kernel"].any()
    kernel = original["embedding"]["kernel"]
    assert torch.equal(params["embedding"]["kernel"], kernel.sum(2, keepdim=True))
    positions = original["Transformer"]["posembed_input"]["pos_embedding"]
    expected = adapt.resize_positions(positions, (4, 4), (6, 3))
    assert torch.equal(params["Transformer"]["posembed_input"]["pos_embedding"], expected)


def test_a_head_can_be_left_out(tmp_path, capsys):
    assert "head (48, 10) dropped" in converted(capsys, TOKEN, tmp_path / "a.safetensors", "--num_classes=0")
    config = weights.describe(tmp_path / "a.safetensors").config
    assert config.num_classes == 0
    features = vitfn.apply(vitfn.load(tmp_path / "a.safetensors"), torch.zeros(2, 3, 32, 32), config)
    assert features.shape == (2, 48)


def test_what_the_file_leaves_open_can_be_assumed(tmp_path, capsys):
    config = dataclasses.replace(SMALL, image_size=(16, 24), gelu="erf")
    arrays = weights.stored(tree.flatten(vitfn.init(config)), config, weights.LAYOUTS["timm"], "")
    np.savez(tmp_path / "a.npz", **{name: leaf.numpy() for name, leaf in arrays})
    assert "found 7 positions, of which the class token may have one, which no square grid" in refused(
        capsys, convert, tmp_path / "a.npz", tmp_path / "b.npz", "--assume=num_heads=3"
    )
    assume = "--assume=num_heads=3,image_size=16x24,mean=[0.4,0.5,0.6],layer_norm_eps=1e-5"
    converted(capsys, tmp_path / "a.npz", tmp_path / "b.npz", assume)
    owner = {"name": "ViT", "posemb_resize": "bicubic_antialias"}
    expected = dataclasses.replace(config, mean=(0.4, 0.5, 0.6), layer_norm_eps=1e-5, **owner)
    assert weights.describe(tmp_path / "b.npz") == (expected, None, True)


def test_class_names_travel_while_there_are_as_many(tmp_path, capsys):
    vitfn.save(tmp_path / "a.npz", vitfn.init(SMALL), SMALL, list("abcdefghij"))
    converted(capsys, tmp_path / "a.npz", tmp_path / "b.safetensors", "--to=huggingface")
    assert weights.describe(tmp_path / "b.safetensors").class_names == tuple("abcdefghij")
    converted(capsys, tmp_path / "a.npz", tmp_path / "c.npz", "--num_classes=3")
    assert weights.describe(tmp_path / "c.npz").class_names is None


def test_a_difference_of_the_other_code_s_numbers_is_stated(tmp_path, capsys):
    config = dataclasses.replace(SMALL, patch_size=1, resnet=vitfn.ResNetConfig(), layer_norm_eps=1e-5)
    vitfn.save(tmp_path / "a.npz", vitfn.init(config), config)
    notes = re.findall(r"^note +(.*)$", converted(capsys, tmp_path / "a.npz", tmp_path / "a.safetensors"), re.M)
    assert notes[0].startswith("this model has GELU tanh, timm's own code erf")
    assert notes[1].startswith("this model has LayerNorm epsilon 1e-05, timm's own code 1e-06")
    assert notes[2].startswith(
        "this model has positions resized by bilinear_corners, timm's own code bicubic_antialias"
    )
    assert notes[3].startswith("timm divides by sqrt(var + 1e-8) where Google")
    assert "note" not in converted(capsys, TOKEN, tmp_path / "b.npz", "--to=linen")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent.npz", "OUT.npz"], "absent.npz: expected a file of weights, found: No such file"),
        ([TOKEN], "found .*token.npz, expected the arguments IN OUT"),
        ([], "found no arguments, expected the arguments IN OUT"),
        ([TOKEN, "OUT.npz", "more"], "expected the arguments IN OUT"),
        ([TOKEN, "OUT.npz", "--to=flax"], "--to=flax"),
        ([TOKEN, "OUT.bin"], "OUT.bin: found the suffix bin, expected one of npz, safetensors"),
        ([TOKEN, "OUT"], "OUT: found the suffix none, expected one of npz, safetensors"),
        ([TOKEN, "OUT.npz", "--img_size=33"], "--img_size.*found 33x33, expected positive multiples of the patch"),
        ([TOKEN, "OUT.npz", "--channels=0"], "--channels=0"),
        ([TOKEN, "OUT.npz", "--assume=heads=3"], "--assume: found 'heads=3', expected FIELD=VALUE with one of"),
        ([TOKEN, "OUT.npz", "--assume=num_heads=5"], "hidden_size: found 48, expected a multiple of num_heads=5"),
        ([TOKEN, "OUT.npz", "--assume=num_heads=x"], "num_heads: found x, expected an integer"),
        ([TOKEN, "OUT.npz", "--assume=std=x"], "std"),
        ([str(REFERENCE / "gap.npz"), "OUT.npz", "--to=seed"], "layout=seed: found the classifier 'gap'"),
        ([str(REFERENCE / "pre_logits.npz"), "OUT.npz", "--to=huggingface"], "--pre_logits=drop, --num_classes=0"),
        ([TOKEN, "no/such/folder/OUT.npz"], "no/such/folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_file(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert re.search(says, refused(capsys, convert, *arguments))
    assert os.listdir(tmp_path) == []


def test_a_file_may_be_converted_onto_itself(tmp_path, capsys):
    path = tmp_path / "a.npz"
    path.write_bytes(Path(TOKEN).read_bytes())
    converted(capsys, path, path, "--to=linen")
    assert_identical(arrays(path), arrays(REFERENCE / "token_linen.npz"))
    assert os.listdir(tmp_path) == ["a.npz"]


def test_the_commands_run_as_modules(tmp_path):
    def vitfn_command(*arguments) -> str:
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
        ).stdout

    vitfn_command("vitfn.convert", TOKEN, tmp_path / "a.safetensors")
    assert "timm" in vitfn_command("vitfn.inspect", tmp_path / "a.safetensors")
    help_text = vitfn_command("vitfn.convert", "--help")
    assert "IN OUT [--to=LAYOUT]" in help_text
    assert all(name in help_text for name in weights.LAYOUTS)


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m vitfn.inspect {TOKEN} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, EXIT_BROKEN_PIPE)
    assert done.stderr == ""


# Other channels


@pytest.mark.parametrize("stem", [None, vitfn.ResNetConfig((1,), 0.5)])
def test_a_grey_image_gives_what_it_gave_as_rgb(tmp_path, stem):
    config = dataclasses.replace(SMALL, patch_size=8 if stem is None else 1, resnet=stem)
    vitfn.save(tmp_path / "a.npz", vitfn.init(config), config)
    grey = dataclasses.replace(config, channels=1)
    params, images = vitfn.load(tmp_path / "a.npz", grey), torch.rand(2, 1, 32, 32)
    expected = vitfn.apply(vitfn.load(tmp_path / "a.npz"), images.expand(-1, 3, -1, -1), config)
    if stem is None:  # a stem standardises the summed kernel anew
        torch.testing.assert_close(vitfn.apply(params, images, grey), expected, atol=1e-5, rtol=1e-5)
    first = "embedding" if stem is None else "conv_root"
    assert params[first]["kernel"].shape[2] == 1


def test_more_channels_take_turns_and_keep_the_scale():
    kernel, own = torch.randn(2, 2, 3, 5), vitfn.ViTConfig()
    wide = adapt.resize_channels(kernel, own, adapt.with_channels(own, 7))
    assert torch.equal(wide[:, :, 4], kernel[:, :, 1] * (3 / 7))
    six = adapt.resize_channels(kernel, own, adapt.with_channels(own, 6))
    torch.testing.assert_close(six.sum(2), kernel.sum(2))


# Inspect


def inspected(capsys, *arguments) -> tuple[dict[str, str], list[str]]:
    code, out, err = run(capsys, inspect, *arguments)
    assert (code, err) == (0, "")
    head, table = out.split("\n\n")
    return dict(re.split(r"  +", line, maxsplit=1) for line in head.splitlines()), table.splitlines()


def test_a_file_is_described_line_by_line(capsys):
    lines, table = inspected(capsys, TOKEN)
    assert lines["file"] == f"{TOKEN}, {os.path.getsize(TOKEN):,} bytes, npz"
    assert lines["layout"] == "original"
    assert lines["model"].startswith("ViT (not stated; assumed a square image, tanh GELU")
    assert lines["parameters"] == "67,594 in 56 arrays"
    assert lines["encoder"] == "3 layers, width 48, 3 heads, MLP 96"
    assert lines["image size"] == "32x32 px, 3 channels, 4x4 patches"
    assert lines["classes"] == "10"
    assert lines["dtype"] == "float32 (56)"
    assert lines["published"] == "none of Google's files has these shapes"
    assert len(table) == 57
    assert re.fullmatch(r"Transformer/encoder_norm/bias +48 +float32", table[1])


def test_a_pre_trained_file_s_zero_head_and_size_are_recognised(tmp_path, capsys):
    config = vitfn.get_config("Ti/16", num_classes=21_843)
    params = tree.unflatten({path: torch.zeros(shape) for path, shape in vitfn.shapes(config).items()})
    vitfn.save_npz(tmp_path / "a.npz", params)
    lines, _ = inspected(capsys, tmp_path / "a.npz")
    assert lines["classes"] == "21,843; the head is all zero, as in Google's imagenet21k files"
    assert re.fullmatch(
        r"the shapes of augreg/Ti_16-i21k-300ep.*\.npz; this file has as many as the 39,029,378 bytes of such an npz",
        lines["published"],
    )
    vitfn.save_npz(tmp_path / "a.npz", params, config)
    more = os.path.getsize(tmp_path / "a.npz") - 39_029_378
    assert f"this file has {more} more than the 39,029,378" in inspected(capsys, tmp_path / "a.npz")[0]["published"]


def test_what_is_no_part_of_the_model_is_marked(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **arrays(REFERENCE / "bv_map.npz"), **{"opt/count": np.array(3)})
    lines, table = inspected(capsys, tmp_path / "a.npz")
    assert lines["layout"] == "big_vision, under params/"
    assert lines["pooling"] == "map"
    assert lines["note"] == "opt/count ignored: no part of the model"
    assert re.fullmatch(r"opt/count +scalar +int64  \(not the model's\)", table[-1])


def test_a_foreign_file_s_class_names_and_arithmetic_are_shown(tmp_path, capsys):
    config = dataclasses.replace(SMALL, gelu="erf")
    arrays = weights.stored(tree.flatten(vitfn.init(config)), config, weights.LAYOUTS["huggingface"], "")
    torch.save({name: leaf.contiguous() for name, leaf in arrays}, tmp_path / "pytorch_model.bin")
    names = {str(i): f"class {i}" for i in range(10)}
    said = {
        "num_attention_heads": 3,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "image_size": 32,
        "id2label": names,
    }
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1] * 3})
    )
    lines, _ = inspected(capsys, tmp_path / "pytorch_model.bin")
    assert lines["layout"] == "huggingface"
    assert lines["model"] == "ViT"  # and nothing assumed
    found = weights.describe(tmp_path / "pytorch_model.bin").config
    assert (found.gelu, found.layer_norm_eps, found.mean, found.std) == ("erf", 1e-12, (0.1, 0.2, 0.3), (1, 1, 1))
    assert lines["class names"] == "class 0, class 1, class 2, class 3, class 4, ..."
    assert lines["encoder"].endswith("3 heads, MLP 96")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"hidden_act": "relu"}'),
        ("config.json", '{"layer_norm_eps": "x"}'),
        ("config.json", '{"num_attention_heads": 7}'),
        ("config.json", '{"hidden_act": []}'),
        ("preprocessor_config.json", '{"image_mean": "x", "image_std": 3}'),
        ("preprocessor_config.json", '{"image_std": [0, 0, 0]}'),
    ],
)
def test_what_is_said_beside_a_foreign_file_and_cannot_be_is_refused(tmp_path, capsys, name, content):
    arrays = weights.stored(tree.flatten(vitfn.init(SMALL)), SMALL, weights.LAYOUTS["huggingface"], "")
    torch.save({name: leaf.contiguous() for name, leaf in arrays}, tmp_path / "model.bin")
    (tmp_path / name).write_text(content)
    assert "model.bin" in refused(capsys, inspect, tmp_path / "model.bin")


# Published files


def test_the_sizes_of_published_files_follow_from_their_shapes(tmp_path):
    rows = {row.file: row for row in published()}
    assert npz_bytes(rows["imagenet21k/ViT-B_16.npz"].config) == 412_815_506
    assert rows["imagenet21k/ViT-B_16.npz"].parameters == 103_186_515
    listed = {
        "imagenet21k/ViT-B_32.npz": 400.01,
        "imagenet21k+imagenet2012/ViT-B_16.npz": 331.4,
        "sam/ViT-B_16.npz": 330.3,
    }
    for file, mebibytes in listed.items():  # Google's bucket, as listed in vit_jax.ipynb
        assert math.isclose(npz_bytes(rows[file].config) / 2**20, mebibytes, abs_tol=0.1)
    for config in (SMALL, dataclasses.replace(SMALL, patch_size=1, resnet=vitfn.ResNetConfig((1, 1), 0.5))):
        vitfn.save_npz(tmp_path / "a.npz", vitfn.init(config))
        assert os.path.getsize(tmp_path / "a.npz") == npz_bytes(config)


def test_the_readme_s_table_is_the_program_s():
    """`python -m vitfn.published` prints it."""
    done = subprocess.run(
        [sys.executable, "-m", "vitfn.published"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout in (ROOT / "weights" / "README.md").read_text()
    assert done.stdout.count("\n") == len(list(published())) + 2
