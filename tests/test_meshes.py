"""Trees on a mesh of processes: placements, memory, and the same numbers as one process finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from hypothesis import given
from hypothesis import strategies as st

from vitfn import get_config, make_train_step, meshes, optim, vit
from vitfn.errors import InputError
from vitfn.meshes import ONE, Mesh

WORKERS = Path(__file__).parent / "meshes"
MIXED = "head/.*=replicated;.*Mlp.*=optimizer;.*=sharded"
# name, mesh, placement, compile form, recipe, precision, whether collectives overlap with computing; see training.py
ALONE = [f"{recipe}||sharded|off|{recipe}|float32|" for recipe in ("sgd", "adamw", "frozen", "parts")]
ALONE += ["bfloat16||sharded|off|frozen|bfloat16|"]
ON_2 = {
    "data, sgd": "|sharded|off|sgd|float32|",
    "data, overlapping, adamw": "|sharded|off|adamw|float32|yes",
    "sharded, sgd": "shard=2|sharded|off|sgd|float32|",
    "optimizer, sgd": "shard=2|optimizer|off|sgd|float32|",
    "optimizer, overlapping, adamw": "shard=2|optimizer|off|adamw|float32|yes",
    "sharded, parts": "shard=2|sharded|off|parts|float32|",
    "optimizer, overlapping, parts": "shard=2|optimizer|off|parts|float32|yes",
    "sharded, frozen, bfloat16": "shard=2|sharded|off|frozen|bfloat16|yes",
}
ON_4 = {
    "data, sgd": "data=4|sharded|off|sgd|float32|",
    "sharded, sgd": "shard=4|sharded|off|sgd|float32|",
    "sharded, overlapping, adamw": "shard=4|sharded|off|adamw|float32|yes",
    "sharded over 2, sgd": "data=2,shard=2|sharded|off|sgd|float32|yes",
    "optimizer over 2, adamw": "data=2|optimizer|off|adamw|float32|",
    "mixed, frozen": f"shard=4|{MIXED}|off|frozen|float32|",
    "mixed over 2, overlapping, frozen": f"data=2,shard=2|{MIXED}|off|frozen|float32|yes",
}
COMPILED = {
    "sharded, block, adamw": "shard=2|sharded|block|adamw|float32|",
    "optimizer, block, frozen": "shard=2|optimizer|block|frozen|float32|yes",
    "optimizer, step, frozen": "shard=2|optimizer|step|frozen|float32|",
}


def processes(count: int, script: str, *arguments: str) -> str:
    """What so many processes of torchrun, or one alone, print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    done = subprocess.run(
        [sys.executable, "-W", "error", *launcher, str(WORKERS / script), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained(folder: Path, count: int, trainings: dict[str, str]) -> dict[str, dict]:
    processes(count, "training.py", str(folder), *(f"{name}|{how}" for name, how in trainings.items()))
    return {name: torch.load(folder / f"{name}.pt") for name in trainings}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    return trained(tmp_path_factory.mktemp("alone"), 1, dict(training.split("|", 1) for training in ALONE))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-3))


def assert_same(found: dict, expected: dict, limit: float) -> None:
    pairs = list(zip(found["curve"], expected["curve"], strict=True))
    assert sum(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs) / len(pairs) <= limit
    assert all(abs(a["grad_norm"] - b["grad_norm"]) <= 100 * limit * b["grad_norm"] for a, b in pairs)
    assert torch.equal(found["predicted"], expected["predicted"])
    assert relative(found["losses"], expected["losses"]) <= 10 * limit
    for path, leaf in expected["final"].items():
        assert relative(found["final"][path], leaf) <= 50 * limit, path


def alone_as(alone: dict[str, dict], how: str) -> dict:
    *_, recipe, precision, _ = how.split("|")
    return alone[recipe if precision == "float32" else precision]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "trainings"), [(2, ON_2), (4, ON_4)])
def test_every_placement_makes_the_run_of_one_process(tmp_path, alone, count, trainings):
    for name, found in trained(tmp_path, count, trainings).items():
        expected = alone_as(alone, trainings[name])
        # rounding to bfloat16 turns the last bit of a sum into one of 8 bits
        assert_same(found, expected, 1e-6 if "bfloat16" not in trainings[name] else 1e-3)
        for part, whole in expected["held"].items():
            cut = "sharded" in name or ("optimizer" in name and part == "opt_state")
            shards = 2 if count == 2 or "over 2" in name else 4
            if cut:
                assert whole / shards <= found["held"][part] <= 1.1 * whole / shards, name
            elif "mixed" not in name:
                assert found["held"][part] == whole, name


@pytest.mark.slow
def test_compiled_meshes_make_the_run_of_one_process(tmp_path, alone):
    for name, found in trained(tmp_path, 2, COMPILED).items():
        assert_same(found, alone_as(alone, COMPILED[name]), 1e-6)


@pytest.mark.slow
def test_a_quarter_of_a_large_model_is_held_and_one_block_gathered():
    """At most 0.3 of what one process has of the parameters and the momentum, with all that is ever gathered."""
    config = get_config("ViT-B_16", image_size=32, num_classes=1000)
    model = 4 * sum(torch.Size(shape).numel() for shape in vit.shapes(config).values())
    for lies, gathered in json.loads(processes(4, "memory.py", "shard=4", "sharded", "float32")):
        assert lies + gathered <= 0.3 * 2 * model
        assert gathered <= 1.01 * 4 * (4 * 768 * 768 + 2 * 768 * 3072)  # the kernels of a block
    for lies, gathered in json.loads(processes(4, "memory.py", "shard=4", "sharded", "bfloat16")):
        assert lies + gathered <= 0.28 * 2 * model
    for lies, _ in json.loads(processes(4, "memory.py", "shard=4", "optimizer", "float32")):
        assert lies <= (1 + 0.26) * model


class Grid:
    """What a Mesh asks of a DeviceMesh."""

    def __init__(self, shards: int, place: int = 0):
        self.shards, self.place = shards, place

    def size(self, dim: int) -> int:
        return self.shards

    def get_local_rank(self, axis: str) -> int:
        return self.place


def mesh(shards: int, placement: str = "sharded", place: int = 0) -> Mesh:
    return Mesh(grid=Grid(shards, place), rules=meshes.rules(placement))


def test_kernels_and_embeddings_are_cut_along_the_first_dimension_or_the_largest_that_can_be():
    cuts = mesh(8).cuts(vit.shapes(get_config("ViT-B_16")), "sharded")
    block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    assert cuts["head/kernel"] == cuts[f"{block}/query/kernel"] == cuts["embedding/kernel"] == 0
    assert cuts[f"{block}/out/kernel"] == 2  # (12, 64, 768) by 8
    assert cuts["Transformer/posembed_input/pos_embedding"] == 2  # (1, 197, 768)
    assert not [path for path in cuts if path.endswith(("bias", "scale", "cls"))]
    assert mesh(7).cuts(vit.shapes(get_config("ViT-B_16")), "sharded") == {}


def test_the_first_rule_that_matches_decides():
    shapes = vit.shapes(SMALL)
    mixed = mesh(2, MIXED)
    assert not [path for path in mixed.cuts(shapes, "sharded") if path.startswith("head") or "Mlp" in path]
    assert mixed.cuts(shapes, "optimizer").keys() == {path for path in shapes if "Mlp" in path}
    assert "Transformer/encoder_norm/scale" in mixed.cuts(shapes, "sharded")
    assert ONE.cuts(shapes, "sharded") == {}


@given(shards=st.sampled_from([1, 2, 3, 4, 6]), dim=st.integers(0, 2))
def test_parts_are_the_whole(shards, dim):
    leaf = torch.arange(12 * 24 * 36).reshape(12, 24, 36)
    parts = [mesh(shards, place=place).part(leaf, dim) for place in range(shards)]
    assert torch.equal(torch.cat(parts, dim), leaf)
    assert {part.shape for part in parts} == {parts[0].shape}


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("", 1, (1, 1)),
        ("", 8, (8, 1)),
        ("data=8", 8, (8, 1)),
        ("data=2", 8, (2, 4)),
        ("shard=4", 8, (2, 4)),
        ("shard=4,data=2", 8, (2, 4)),
        ("data=2,shard=4", 8, (2, 4)),
        ("shard=1", 1, (1, 1)),
    ],
)
def test_a_mesh_fits_the_processes(text, count, expected):
    assert tuple(meshes.sizes(text, count).values()) == expected


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("shard=4", 6, "--mesh=shard=4: found 6 processes, expected 4"),
        ("data=2,shard=2", 8, "--mesh=data=2,shard=2: found 8 processes, expected 4"),
        ("data=2,data=2", 4, "--mesh: found 'data=2,data=2', expected sizes as in data=2,shard=4"),
        ("shard=0", 4, "--mesh: found 'shard=0'"),
        ("rows=2", 2, "--mesh: found 'rows=2'"),
        ("shard=2,", 2, "--mesh: found 'shard=2,'"),
    ],
)
def test_other_meshes_are_refused(text, count, message):
    with pytest.raises(InputError, match=message):
        meshes.sizes(text, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "--placement: found 'half', expected one of replicated, optimizer, sharded, or REGEX=one of them"),
        ("head/.*=half", "--placement: found 'half'"),
        ("sharded;", "--placement: found ''"),
        ("(=sharded", "--placement=.*: expected a regular expression"),
    ],
)
def test_other_placements_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        meshes.rules(text)


def test_one_graph_of_sharded_parameters_is_refused():
    optimizer = optim.sgd(lambda step: 0.1)
    with pytest.raises(InputError, match="compile=step: one graph cannot gather sharded parameters"):
        make_train_step(SMALL, optimizer, compile="step", mesh=mesh(2))
    make_train_step(SMALL, optimizer, compile="step", mesh=mesh(2, "optimizer"))
