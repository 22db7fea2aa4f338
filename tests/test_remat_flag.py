"""--remat: what is recomputed, chosen by the flag or by the memory that is free, changes no number."""

import json
import logging

import pytest
from absl.flags import FlagValues
from conftest import NANO
from test_train import python

import vitfn
from vitfn import device, flags, plan, recipe
from vitfn.device import DEVICES
from vitfn.errors import InputError
from vitfn.meshes import ONE

CONFIG = vitfn.get_config("L/16")
BATCH = 64


def parsed(*argv: str) -> FlagValues:
    fv = FlagValues()
    for group in flags.TRAIN:
        group(fv)
    fv(["train", "--model_type=L/16", f"--train_batch_size={BATCH}", "--num_steps=10", *argv])
    return fv


@pytest.fixture
def chosen(monkeypatch):
    """A function: what --remat=auto is with so many bytes free."""

    def choose(free: float | None, *argv: str, precision: str = "float32") -> str:
        monkeypatch.setattr(device, "free_memory", lambda row: free)
        return recipe.remat(parsed("--remat=auto", *argv), DEVICES["cpu"], CONFIG, precision, ONE)

    return choose


def peak(remat: str, batch: int = BATCH, **how) -> float:
    return plan.memory(CONFIG, batch, remat=remat, overlaps=False, **how).peak


@pytest.mark.parametrize("kind", ["none", "attention", "block"])
def test_auto_is_the_first_that_fits_in_nine_tenths_of_what_is_free(chosen, kind, caplog):
    caplog.set_level(logging.INFO, "vitfn")
    assert chosen(peak(kind) / 0.89) == kind
    assert [record.levelname for record in caplog.records] == [] if kind == "none" else ["INFO"]
    assert chosen(peak(kind) / 0.91) != kind or kind == "block"


def test_auto_says_what_helps_where_nothing_fits(chosen, caplog):
    assert chosen(peak("block") / 2) == "block"
    (record,) = caplog.records
    for part in ("even block needs", f"{peak('block') / 1e9:.1f} GB", "--train_batch_size", "--gradient_accum"):
        assert part in record.message


def test_auto_is_none_where_a_device_does_not_say_what_is_free(chosen):
    assert chosen(None) == "none"


def test_auto_knows_the_optimizer_the_average_the_precision_and_the_parts(chosen):
    free = 1.001 * peak("none") / 0.9
    assert chosen(free) == "none"
    assert chosen(free, "--optimizer=adamw") == "attention"
    assert chosen(free, "--ema=0.9") == "attention"
    free = 1.001 * peak("none", BATCH // 4, parts=4) / 0.9
    assert chosen(free, "--gradient_accumulation_steps=4") == "none"
    assert chosen(free) == "block"
    assert chosen(1.001 * peak("none", half=True) / 0.9, precision="bfloat16") == "none"


@pytest.mark.parametrize("kind", ["attention", "block", "auto"])
def test_one_graph_is_refused_with_both_flags_and_what_can(kind):
    with pytest.raises(InputError, match=f"--remat={kind} --compile=step: .*expected block or off"):
        recipe.check(parsed(f"--remat={kind}", "--compile=step"), DEVICES["cpu"])


def test_what_is_free_on_this_machine_is_some_memory():
    assert 2**20 < device.free_memory(DEVICES["cpu"]) < 2**50


@pytest.mark.slow
def test_a_run_that_recomputes_has_the_same_losses_and_may_be_resumed_without(tmp_path):
    """Compiled by block, in float32."""

    def losses(name: str) -> list[float]:
        lines = (tmp_path / "output" / name / "metrics.jsonl").read_text().splitlines()
        return [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]

    def train(name: str, *argv: str) -> dict:
        run = ["--warmup_steps=1", "--num_steps=3", "--device=cpu", "--compile=block", "--noreport", f"--name={name}"]
        python("-m", "vitfn.train", *NANO, *run, *argv, cwd=tmp_path)
        return json.loads((tmp_path / "output" / name / "config.json").read_text())

    assert train("plain")["resolved"]["remat"] == "none"
    assert train("block", "--remat=block")["resolved"]["remat"] == "block"
    train("block", "--resume", "--remat=none")  # is not refused
    assert losses("block") == losses("plain") != []
