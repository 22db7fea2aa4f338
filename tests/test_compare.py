"""python -m vitfn.compare: the ModelZoo's figures to the last digit, and what they hide."""

import json
import math
import re

import numpy as np
import pytest
from conftest import SHARED

from vitfn import compare


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = compare.main(["vitfn", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def curves(tmp_path):
    """Writes a CSV of two columns, a and b, and names its two curves."""

    def write(a, b) -> tuple[str, str]:
        path = tmp_path / "curves.csv"
        path.write_text("step,a,b\n" + "".join(f"{i},{x!r},{y!r}\n" for i, (x, y) in enumerate(zip(a, b, strict=True))))
        return f"{path}:a", f"{path}:b"

    return write


def test_the_seed_s_published_figures_and_what_they_hide(capsys):
    path = SHARED / "reference" / "seed_loss_curves.csv"
    if not path.exists():
        pytest.skip("the seed's curves are not part of the repository (../shared/reference is absent)")
    code, out, err = run(capsys, f"{path}:cuda_loss", f"{path}:sdaa_loss")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:4] == [
        "MeanRelativeError: 0.0013006236212555371",
        "MeanAbsoluteError: 0.0018261265754699707",
        "Rule,mean_relative_error 0.0013006236212555371",
        "pass mean_relative_error=0.0013006236212555371 <= 0.05 or mean_absolute_error=0.0018261265754699707 <= 0.0002",
    ]
    shown = dict(re.split(r"  +", line, maxsplit=1) for line in lines[5:])
    assert shown["unsigned mean relative error"] == "0.0026920"
    assert shown["unsigned mean absolute error"] == "0.0042989"
    assert shown["largest relative error"].startswith("0.0285")
    assert "at step 98" in shown["largest relative error"]
    assert math.isclose(float(shown["first 20 steps"]), 5.71e-5, rel_tol=0.02)
    assert math.isclose(float(shown["last 20 steps"]), 7.91e-3, rel_tol=0.001)
    assert shown["verdict"].startswith("within")


def test_a_lower_curve_passes_the_vendor_s_rule_and_not_ours(capsys, curves):
    code, out, _ = run(capsys, *curves([2.0, 1.5, 1.0], [0.0, 0.0, 0.0]))
    assert code == 1
    assert "pass mean_relative_error=-1.0 <= 0.05" in out
    assert "BEYOND the limit of 0.01 unsigned" in out
    assert re.search(r"steps where B is below A +100.0%", out)


def test_errors_that_cancel_are_counted(capsys, curves):
    code, out, _ = run(capsys, *curves([1.0, 1.0], [0.5, 1.5]))
    assert code == 1
    assert "MeanRelativeError: 0.0\n" in out
    assert re.search(r"unsigned mean relative error +0.5000000\n", out)


def test_a_curve_above_fails_both(capsys, curves):
    code, out, _ = run(capsys, *curves([1.0, 1.0], [1.1, 1.2]))
    assert code == 1
    assert re.search(r"^fail mean_relative_error=0.15", out, re.M)


def test_the_limit_is_a_flag(capsys, curves):
    a, b = curves([1.0, 1.0], [1.1, 1.2])
    assert run(capsys, a, b, "--limit=0.16")[0] == 0
    assert run(capsys, a, b, "--limit=0.14")[0] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_never_passes(capsys, curves, bad):
    code, out, _ = run(capsys, *curves([1.0, 1.0, 1.0], [1.0, bad, 1.0]))
    assert code == 1
    assert re.search(r"verdict +BEYOND", out)


def test_every_kind_of_log_is_read(tmp_path):
    losses = [2.302585, 1.5, 1e-3]
    vendor = "INFO x\n" + "".join(
        f"TCAPPDLL 2025-05-15 - Epoch: 0 Iteration: {i}  rank : {rank}  train.loss : {loss + rank}  train.ips : 9.5 x/s"
        for i, loss in enumerate(losses)
        for rank in (0, 1)
    )
    bar = "\r".join(
        f"Training ({i + 1} / 3 Steps) (loss={loss:.6f}): 33%" for i, loss in enumerate(losses) for _ in range(2)
    )
    rows = [{"step": 0, "eval/loss": 9.0}, *({"step": i + 1, "train/loss": loss} for i, loss in enumerate(losses))]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sdaa.log").write_text(vendor)
    (tmp_path / "bar.txt").write_text(bar)
    (tmp_path / "plain.log").write_text("".join(f"step {i} loss {loss}\n" for i, loss in enumerate(losses)))
    (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{loss},1\n" for loss in losses))
    for name in ("run", "run/metrics.jsonl", "sdaa.log", "bar.txt", "plain.log", "a.csv:x"):
        np.testing.assert_allclose(compare.read_curve(str(tmp_path / name)), losses, rtol=1e-12)


def test_the_shorter_curve_decides_and_it_is_said(capsys, tmp_path):
    (tmp_path / "a.log").write_text("loss 1\nloss 2\nloss 3\n")
    (tmp_path / "b.log").write_text("loss 1\nloss 2\n")
    code, out, _ = run(capsys, tmp_path / "a.log", tmp_path / "b.log")
    assert code == 0
    assert out.startswith("3 and 2 steps: the first 2 are compared\n")


def test_a_skipped_step_s_null_is_not_a_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"train/loss": null}\n{"train/loss": 1.0}\n')
    assert np.isnan(compare.read_curve(str(tmp_path / "metrics.jsonl"))).tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.log", "nothing here", "found no loss"),
        ("a.csv:z", "x,y\n1,2\n", "the columns x, y"),
        ("a.csv:x", "x,y\none,2\n", "could not convert"),
        ("metrics.jsonl", "{", "expected a loss curve"),
        ("metrics.jsonl", "[1]\n", "found no loss"),
        ("metrics.jsonl", '{"train/loss": "x"}\n', "could not convert"),
        ("absent", None, "No such file"),
    ],
)
def test_what_is_no_curve_is_refused_in_one_line(capsys, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_text(content)
    code, out, err = run(capsys, tmp_path / name, tmp_path / name)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err


def test_a_plot_is_drawn(capsys, tmp_path, curves):
    pytest.importorskip("matplotlib")
    a, b = curves([2.0, 1.5, 1.0], [2.0, 1.4, 1.1])
    run(capsys, a, b, f"--plot={tmp_path / 'loss.png'}")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, a, b, f"--plot={tmp_path / 'loss.xyz'}")
    assert code == 2
    assert "--plot=" in err
