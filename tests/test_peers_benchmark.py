"""benchmarks/peers.py: that its contenders do the same work, and what its tables make of the numbers."""

import copy
import json
import subprocess
import sys

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import peers_report  # noqa: E402

RECORD = {
    "what": "train",
    "model": "ViT-Ti_16",
    "layers": 12,
    "batch": 16,
    "device": "cpu",
    "precision": "float32",
    "machine": "2 cores",
    "date": "2026-01-01",
    "versions": {"torch": "2.13.0"},
    "left_out": {"Flax": "No module named 'jax'"},
    "contenders": {
        "vitfn": {"seconds": [9, 9, 1, 2, 3, 4, 5], "losses": [2.0, 1.0], "peak": 300, "steady": 100},
        "timm": {"seconds": [1, 1, 2, 2, 2, 8, 5], "losses": [2.0, 1.0001], "peak": 600, "steady": 50},
        "torchvision": {"seconds": [1, 1, 4, 4, 4, 4, 4], "losses": [2.5, 1.5], "peak": 300, "steady": 0},
    },
}


def test_ratios_are_taken_within_rounds_after_those_that_warm_up():
    assert peers_report.ratios(RECORD, "timm") == [0.5, 1, 1.5, 0.5, 1]
    assert peers_report.quartiles([0.5, 1, 1.5, 0.5, 1]) == (0.5, 1, 1)


def test_the_tables_have_ratios_images_memory_and_who_is_left_out():
    text = peers_report.tables([RECORD])
    assert "| ViT-Ti_16, batch 16 | vitfn | 3000.0 (2000.0 to 4000.0) | 5.3 | 1 |" in text
    assert "| timm, eager | 2000.0 (2000.0 to 5000.0) | 8.0 | **1.000 (0.500 to 1.000)** |" in text
    assert "| timm, eager | 0 | 0.50 | 0 | 2.00 |" in text
    assert "| torchvision, eager | 0 | 1.00 |  |  |" in text
    assert "agree within 1e-04 in all steps" in text
    assert "Flax and optax, jit left out: No module named 'jax'." in text
    assert "Not measured. On a machine with one:" in text


def test_waits_are_compared_by_their_medians():
    waits = {"vitfn": {"cold": [19.0, 20, 30], "warm": [5, 6, 4]}, "timm": {"cold": [40, 50, 60], "warm": [0.1] * 3}}
    text = peers_report.tables([RECORD | {"what": "first", "contenders": waits}])
    assert "| ViT-Ti_16, batch 16, 12 layers | vitfn | 20.0 (19.0 to 30.0) | 5.0 (4.0 to 6.0) | 0.25 | 1.00 |" in text
    assert "| timm, eager | 50.0 (40.0 to 60.0) | 0.1 (0.1 to 0.1) | 0.00 | 0.40 |" in text


def test_the_tables_go_between_the_markers_and_a_second_time_replace_the_first(tmp_path):
    readme, plot = tmp_path / "README.md", tmp_path / "elsewhere.png"
    readme.write_text("before\n<!-- peers -->\nold\n<!-- /peers -->\nafter\n")
    for text in ("first", "second"):
        peers_report.write(text, plot, readme)
    assert readme.read_text() == "before\n<!-- peers -->\nsecond\n<!-- /peers -->\nafter\n"


def test_the_readme_has_the_markers():
    text = (BENCHMARKS / "README.md").read_text()
    assert [text.count(marker) for marker in peers_report.MARKERS] == [1, 1]


def test_a_panel_s_bars_are_the_others_times_divided_by_vitfn_s(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    peers_report.draw(axes, [RECORD, copy.deepcopy(RECORD) | {"what": "eval"}])
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [1, 1, 4 / 3] * 2
    peers_report.save_plot([RECORD], tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_all_contenders_that_are_installed_have_the_same_losses_in_every_step(tmp_path):
    """Weights, model, loss, clipping and update: after three updates a difference in any of them shows.

    timm compiled is left out, for its time. torchvision's GELU is another.
    """
    command = [
        sys.executable,
        str(BENCHMARKS / "peers.py"),
        "Nano/8:4",
        "--layers=2",
        "--rounds=4",
        "--threads=1",
        f"--out={tmp_path}",
    ]
    command += ["--what=train,eval,memory", "--contenders=timm,Hugging Face,torchvision,Flax"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    train, evaluation = json.loads((tmp_path / "records.json").read_text())
    assert (train["what"], evaluation["what"]) == ("train", "eval")
    for record in (train, evaluation):
        assert len(record["contenders"]) + len(record["left_out"]) == 5
        ours = record["contenders"]["vitfn"]["losses"]
        for name, found in record["contenders"].items():
            assert found["losses"] == pytest.approx(ours, rel=1e-4 if name == "torchvision" else 1e-6), name
            assert min(found["seconds"]) > 0
            assert found["peak"] >= found["steady"] > 0
    losses = train["contenders"]["vitfn"]["losses"]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[3] + 0.01
    assert (tmp_path / "tables.md").read_text().count("| vitfn |") == 3
