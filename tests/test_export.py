"""python -m vitfn.export: ONNX and torch.export files give the numbers of vitfn.apply."""

import dataclasses
import importlib
import io
import json
import os
import re

import pytest
import torch
import warm
from conftest import REFERENCE, ROOT, SMALL, without_bar
from torch import Tensor

import vitfn
from vitfn import export, tree, weights
from vitfn.preprocessing import Preprocessing

TOKEN = str(REFERENCE / "token.npz")
FAMILIES = {
    "token": SMALL,
    "pre_logits": dataclasses.replace(SMALL, representation_size=40),
    "gap": dataclasses.replace(SMALL, classifier="gap"),
    "map": dataclasses.replace(SMALL, classifier="map"),
    "sincos": dataclasses.replace(SMALL, classifier="gap", posemb="sincos2d"),
    "headless": dataclasses.replace(SMALL, num_classes=0),
    "oblong": dataclasses.replace(SMALL, image_size=(16, 40)),
    "grey": dataclasses.replace(SMALL, channels=1),
    "erf": dataclasses.replace(SMALL, gelu="erf"),
    "hybrid": dataclasses.replace(SMALL, patch_size=1, resnet=vitfn.ResNetConfig((1, 1), 0.5)),
    "stem": dataclasses.replace(SMALL, patch_size=4, image_size=(33, 45), resnet=vitfn.ResNetConfig((), 0.5)),
}


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxruntime", reason="requirements-dev.txt has it")
    pytest.importorskip("onnxconverter_common", reason="requirements-dev.txt has it")
    return pytest.importorskip("onnx", reason="requirements-dev.txt has it")


def model(config: vitfn.ViTConfig) -> dict:
    """No leaf is zero, as some are at first."""
    generator = torch.Generator().manual_seed(0)
    return tree.map(lambda leaf: leaf + 0.05 * torch.randn(leaf.shape, generator=generator), vitfn.init(config))


def images(config: vitfn.ViTConfig, batch: int) -> Tensor:
    return torch.randn(batch, config.channels, *config.image_hw, generator=torch.Generator().manual_seed(batch))


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.float() - wanted).abs().max() / wanted.abs().max())


# The numbers


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("opset", "batch"), [(12, None), (17, 3)])
def test_onnx_gives_the_numbers_of_apply(onnx, name, opset, batch):
    assert_same_numbers(onnx, name, opset, batch)


@pytest.mark.parametrize("name", ["token", "hybrid"])
@pytest.mark.parametrize(("opset", "batch"), [(12, 2), (13, None), (14, 2), (15, None), (16, 1), (17, None)])
def test_every_opset_does_so(onnx, name, opset, batch):
    assert_same_numbers(onnx, name, opset, batch)


def assert_same_numbers(onnx, name, opset, batch) -> None:
    config = FAMILIES[name]
    params = model(config)
    data = export.to_onnx(params, config, opset=opset, batch=batch)
    run = export.onnx_runner(data)
    for size in (1, 3, 8) if batch is None else (batch,):
        x = images(config, size)
        assert error(run(x), vitfn.apply(params, x, config)) <= 1e-5
    proto = onnx.load_model_from_string(data)
    assert [entry.version for entry in proto.opset_import] == [opset]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("opset", "batch"), [(12, 2), (17, None)])
def test_float16_does_so_to_its_own_rounding_and_takes_and_gives_it(onnx, name, opset, batch):
    config = FAMILIES[name]
    params = model(config)
    run = export.onnx_runner(export.to_onnx(params, config, opset=opset, batch=batch, dtype=torch.float16))
    x = images(config, 2).half()
    found = run(x)
    assert found.dtype == torch.float16
    assert 1e-6 < error(found, vitfn.apply(params, x.float(), config)) <= 1e-2


@pytest.mark.parametrize("opset", [12, 17])
def test_large_activations_do_not_leave_float16_s_range(onnx, opset):
    """As in large models: the square of 1,000 is beyond 65,504."""
    params = model(SMALL)
    params["embedding"]["bias"][5] = 1000
    run = export.onnx_runner(export.to_onnx(params, SMALL, opset=opset, dtype=torch.float16))
    x = images(SMALL, 1).half()
    assert error(run(x), vitfn.apply(params, x.float(), SMALL)) <= 2e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["token", "hybrid", *(pytest.param(name, marks=pytest.mark.full) for name in ("map", "sincos"))]
)
@pytest.mark.parametrize(("batch", "dtype"), [(None, torch.float32), (2, torch.float16)])
def test_a_program_gives_the_numbers_of_apply(name, batch, dtype):
    config = FAMILIES[name]
    params = model(config)
    program = torch.export.load(io.BytesIO(export.to_program(params, config, batch, dtype)))
    for size in (1, 3, 8) if batch is None else (batch,):
        x = images(config, size).to(dtype)
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert error(program.module()(x), vitfn.apply(params, x.float(), config)) <= limit


def test_a_wrong_model_is_refused():
    params = model(SMALL)
    wrong = tree.map(lambda leaf: leaf * 1.001, params)
    with pytest.raises(vitfn.errors.RunError, match=r"differs from vitfn.apply by .* \(limit 1e-04\); nothing was"):
        export.largest_difference(lambda x: vitfn.apply(wrong, x, SMALL), params, SMALL, 1, torch.float32)
    with pytest.raises(vitfn.errors.RunError, match="by nan of"):
        export.largest_difference(lambda x: torch.full((1, 10), torch.nan), params, SMALL, 1, torch.float32)


# The file

_PLAIN = "Add Concat Constant Div Flatten Gather Gemm MatMul Mul Reshape Softmax Tanh Transpose"
_ONE_QUERY = " Unsqueeze"  # the class token's in the last block, or a pooling head's
_LAST_BLOCK = " Slice" + _ONE_QUERY
_WRITTEN_OUT = " Pow ReduceMean Sqrt Sub"
_DYNAMIC = " ConstantOfShape Equal Expand Shape Where"
_STEM = " Cast ConstantOfShape Conv InstanceNormalization MaxPool Pad Relu Shape Slice"


@pytest.mark.parametrize(
    ("name", "opset", "batch", "operators"),
    [
        ("token", 12, 1, _PLAIN + _WRITTEN_OUT + _LAST_BLOCK),
        ("token", 12, None, _PLAIN + _WRITTEN_OUT + _LAST_BLOCK + _DYNAMIC),
        ("token", 17, 1, _PLAIN + _LAST_BLOCK + " LayerNormalization"),
        ("map", 12, 1, _PLAIN.replace(" Concat", "") + _WRITTEN_OUT + _ONE_QUERY),
        ("hybrid", 12, 1, _PLAIN + _WRITTEN_OUT + _ONE_QUERY + _STEM),
    ],
)
def test_the_operators_are_these_so_that_a_new_one_is_a_decision(onnx, name, opset, batch, operators):
    proto = onnx.load_model_from_string(export.to_onnx(model(FAMILIES[name]), FAMILIES[name], None, opset, batch))
    assert sorted({node.op_type for node in proto.graph.node}) == sorted(operators.split())
    constants = [a.t for node in proto.graph.node if node.op_type == "Constant" for a in node.attribute]
    types = {tensor.data_type for tensor in [*constants, *proto.graph.initializer]}
    assert onnx.TensorProto.DOUBLE not in types


def test_the_file_is_the_same_each_time_and_says_how_to_preprocess(onnx):
    config = dataclasses.replace(SMALL, mean=(0.1, 0.2, 0.3), image_size=(16, 40))
    crop = Preprocessing(0.9, "bicubic")
    names = tuple("abcdefghij")
    first, second = (export.to_onnx(model(config), config, names, preprocessing=crop) for _ in range(2))
    assert first == second
    proto = onnx.load_model_from_string(first)
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert said.pop("model") == "small"
    assert {name: json.loads(value) for name, value in said.items()} == {
        "image_size": [16, 40],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5] * 3,
        "preprocessing": {"fraction": 0.9, "interpolation": "bicubic", "keep_ratio": True, "down": False},
        "class_names": list("abcdefghij"),
    }
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["input", "output"]
    assert [size.dim_value for size in proto.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 16, 40]


# The command


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = export.main(["vitfn", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, without_bar(err)


@pytest.mark.parametrize("flags", [[], ["--batch=dynamic", "--opset=17"], ["--precision=float16", "--batch=2"]])
def test_a_run_s_weights_are_exported_and_checked(onnx, tmp_path, capsys, flags):
    vitfn.save(tmp_path / "model.npz", model(SMALL), SMALL)
    (tmp_path / "config.json").write_text("{}")
    code, out, err = run(capsys, tmp_path, tmp_path / "a.onnx", *flags)
    assert (code, err) == (0, "")
    lines = dict(re.split(r" +", line, maxsplit=1) for line in out.splitlines())
    assert lines["from"] == str(tmp_path / "model.npz")
    assert lines["to"] == f"{tmp_path / 'a.onnx'} ({os.path.getsize(tmp_path / 'a.onnx'):,} bytes)"
    assert lines["opset"] == ("17" if "--opset=17" in flags else "12")
    assert re.fullmatch(r"\d\.\de-\d\d of the largest output \(limit \de-\d\d\)", lines["difference"])
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "config.json", "model.npz"]


def test_a_program_is_exported_and_checked(tmp_path, capsys):
    vitfn.save(tmp_path / "model.npz", model(SMALL), SMALL)
    code, out, err = run(capsys, tmp_path / "model.npz", tmp_path / "a.pt2", "--batch=dynamic")
    assert (code, err) == (0, "")
    assert "opset" not in out
    assert "(limit 1e-04)" in out
    torch.export.load(tmp_path / "a.pt2")


@pytest.mark.slow
@pytest.mark.oldest
def test_a_process_that_has_compiled_nothing_exports_a_program(tmp_path):
    """torch 2.7's Dynamo has to be told of einops first, which compiling does too."""
    vitfn.save(tmp_path / "model.npz", model(SMALL), SMALL)
    done = warm.run(["-m", "vitfn.export", "model.npz", "a.pt2"], tmp_path, os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.pt2").exists()


def absent(monkeypatch, *names):
    real = importlib.import_module

    def importing(name):
        if name.split(".")[0] in names:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", importing)


def test_without_onnxruntime_the_file_is_written_and_said_to_be_unchecked(onnx, tmp_path, capsys, monkeypatch):
    vitfn.save(tmp_path / "model.npz", model(SMALL), SMALL)
    absent(monkeypatch, "onnxruntime")
    code, out, err = run(capsys, tmp_path / "model.npz", tmp_path / "a.onnx")
    assert (code, err) == (0, "")
    assert re.search(r"^difference +not checked: pip install onnxruntime$", out, re.M)


@pytest.mark.parametrize(
    ("missing", "flags", "package"),
    [("onnx", [], "onnx"), ("onnxconverter_common", ["--precision=float16"], "onnxconverter-common")],
)
def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch, missing, flags, package):
    if missing != "onnx":
        pytest.importorskip("onnx", reason="requirements-dev.txt has it")
    absent(monkeypatch, missing)
    code, out, err = run(capsys, TOKEN, tmp_path / "a.onnx", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.endswith(f"pip install {package}\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["OUT.bin"], "OUT.bin: found the suffix .bin, expected .onnx or .pt2"),
        (["OUT"], "OUT: found the suffix none"),
        (["OUT.onnx", "--opset=11"], "--opset=11"),
        (["OUT.onnx", "--opset=18"], "--opset=18"),
        (["OUT.onnx", "--batch=0"], "--batch=0: expected an integer of at least 1, or dynamic"),
        (["OUT.onnx", "--batch=any"], "--batch=any: expected an integer"),
        (["OUT.onnx", "--precision=bfloat16"], "--precision=bfloat16"),
        (["no/such/OUT.onnx"], "no/such/OUT.onnx: found no folder no/such"),
        ([], "expected the arguments MODEL OUT"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_file(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, TOKEN, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert os.listdir(tmp_path) == []


def test_two_gigabytes_are_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    config = vitfn.get_config("H/14")
    found = weights.Details(weights.Description(config, None, True), None, "")
    monkeypatch.setattr(weights, "details", lambda path: found)
    monkeypatch.setattr(weights, "load", None)
    code, out, err = run(capsys, TOKEN, tmp_path / "a.onnx", "--precision=float16")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(r"a.onnx: found 2,52\d,\d{3},\d{3} bytes of float32, expected at most 2,147,483,647", err)
    assert os.listdir(tmp_path) == []
