"""Files of earlier versions: what tests/written holds is read, evaluated and converted by every later one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import warm
from written.write import run_flags, sample

import vitfn
from vitfn import weights

WRITTEN = Path(__file__).parent / "written"
OUTPUTS = json.loads((WRITTEN / "outputs.json").read_text())


@pytest.mark.parametrize("name", OUTPUTS)
def test_weights_give_the_outputs_they_gave(name):
    params, described = vitfn.load(WRITTEN / name), weights.describe(WRITTEN / name)
    found = vitfn.apply(params, sample(described.config), described.config)
    torch.testing.assert_close(found, torch.tensor([OUTPUTS[name]]), rtol=1e-5, atol=1e-6)
    if "folded" not in name:
        assert described.stated
        assert bool(described.class_names) == bool(described.config.num_classes)


def test_a_stopped_run_is_evaluated(tmp_path):
    shutil.copytree(WRITTEN / "stopped", tmp_path / "stopped")
    done = warm.run(
        ["-m", "vitfn.evaluate", str(tmp_path / "stopped"), "--device=cpu", "--num_workers=0", "--compile=off"]
    )
    rows = [json.loads(line) for line in (WRITTEN / "stopped" / "metrics.jsonl").read_text().splitlines()]
    best = max(row["eval/accuracy"] for row in rows if "eval/accuracy" in row)
    assert done.returncode == 0, done.stderr
    assert f"{best:.2%}" in done.stdout


@pytest.mark.parametrize(("name", "best"), [("stopped", "best.npz"), ("sharded", "checkpoints/step_00000021")])
def test_a_run_with_other_random_numbers_is_not_gone_on_with(name, best, tmp_path):
    """Version 1 had two rounds of the hash behind dropout, the order of the images and augmentation."""
    shutil.copytree(WRITTEN / name, run := tmp_path / name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    flags = [f"--output_dir={tmp_path}" if flag == "--output_dir=." else flag for flag in run_flags(name)]
    done = warm.run(["-m", "vitfn.train", *flags, "--resume"])
    assert done.returncode == 2, done.stderr
    *_, line = done.stderr.strip().splitlines()  # with another torch than wrote it, it is the second
    assert line.startswith("vitfn: --resume: found a run with random numbers of version 1, expected 2: finish it with")
    assert line.endswith(f"start a new run from its weights with --pretrained_dir={run / best}")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("checkpoint", ["stopped/checkpoints/step_00000031.npz", "sharded/checkpoints/step_00000021"])
def test_checkpoints_are_converted(checkpoint, tmp_path):
    done = warm.run(["-m", "vitfn.convert", str(WRITTEN / checkpoint), str(tmp_path / "model.npz")])
    assert done.returncode == 0, done.stderr
    assert weights.describe(tmp_path / "model.npz").class_names == tuple("0123456789")
