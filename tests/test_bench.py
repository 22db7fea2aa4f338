"""vitfn.bench: clocks that are known, operators that are counted, and the command as its user gives it."""

import csv
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from absl.flags import FlagValues
from conftest import ROOT
from torch.autograd import DeviceType

from vitfn import bench, bench_measures, device, flags, operators, timing, tree, workload

NANO = ["--device=cpu", "--model_type=ViT-Nano_8", "--img_size=32", "--train_batch_size=4", "--rounds=3", "--seconds=1"]
OFF = [*NANO, "--compile=off"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what is added to it."""
    now = types.SimpleNamespace(time=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.time)
    return now


def work_of(*argv: str) -> workload.Workload:
    fv = FlagValues()
    for group in (*flags.TRAIN, flags.bench_flags, bench._other_defaults):
        group(fv)
    fv(["bench", *OFF, *argv])
    return workload.from_flags(fv)


def benched(out: Path, *argv: str) -> dict:
    assert bench.main(["bench", *argv, f"--out={out}"]) == 0
    return json.loads((out / "bench.json").read_text())


def python(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_seconds_are_of_one_call_and_of_the_wait_at_the_end(clock):
    def call():
        clock.time += 2
        return types.SimpleNamespace(item=lambda: setattr(clock, "time", clock.time + 1))

    assert timing.seconds(call) == 3
    assert timing.seconds(call, 4) == (4 * 2 + 1) / 4


def test_rounds_are_taken_in_turns_of_a_tenth_of_a_second(clock):
    made = []

    def call(name, seconds):
        made.append(name)
        clock.time += seconds
        return torch.zeros(())

    calls = {"slow": lambda: call("slow", 0.5), "fast": lambda: call("fast", 0.025)}
    found = timing.steady(calls, 5, 1e9)
    assert found == {"slow": [0.5] * 5, "fast": [pytest.approx(0.025)] * 5}
    assert made == ["slow"] * 2 + ["fast"] * 2 + (["slow"] + ["fast"] * 4) * 5


@pytest.mark.parametrize(("limit", "rounds"), [(0, 3), (3.5, 4), (100, 9)])
def test_no_round_begins_after_the_limit_once_there_are_three(clock, limit, rounds):
    def call():
        clock.time += 1
        return torch.zeros(())

    assert timing.steady({"a": call}, 9, limit) == {"a": [1.0] * rounds}


def test_quartiles_are_those_between_the_numbers():
    assert timing.milliseconds([0.005, 0.001, 0.002, 0.004, 0.003]) == {"median": 3, "lower": 2, "upper": 4}
    assert timing.milliseconds([0.0, 0.004]) == {"median": 2, "lower": 1, "upper": 3}


def test_the_most_memory_is_remembered_after_it_is_given_back():
    if (before := timing.resident()) is None:
        pytest.skip("the system does not say what memory a process takes")
    size = 2 * max(2**28, before[1] - before[0])  # beyond whatever this process has had
    torch.ones(size // 4)
    now, most = timing.resident()
    assert most - before[0] >= 0.95 * size
    if now != most:  # the system says both
        assert now - before[0] < size / 2


def test_operators_are_counted_a_step():
    a = torch.randn(64, 64)
    listed, fused = operators.profiled(lambda: (a @ a @ a).sum())
    found = {each.name: each for each in listed}
    assert found["aten::mm"].calls == 2
    assert found["aten::sum"].calls == 1
    assert sum(each.share for each in listed) == pytest.approx(1)
    assert [each.milliseconds for each in listed] == sorted((each.milliseconds for each in listed), reverse=True)
    assert fused == []


def test_fused_attention_is_seen_by_its_name():
    q = torch.randn(1, 2, 8, 8)
    _, fused = operators.profiled(lambda: F.scaled_dot_product_attention(q, q, q).sum())
    assert fused == ["aten::_scaled_dot_product_flash_attention_for_cpu"]


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("aten::_scaled_dot_product_cudnn_attention", True),
        ("aten::_efficient_attention_forward", True),
        ("aten::_scaled_dot_product_fused_attention_overrideable", True),
        ("aten::_scaled_dot_product_flash_attention_backward", False),
        ("aten::_scaled_dot_product_attention_math", False),
        ("triton_poi_fused_add_0", False),
    ],
)
def test_which_names_are_fused_attention_s(name, fused):
    assert bool(operators._FUSED.match(name)) == fused


def test_on_a_device_its_kernels_are_listed_and_not_what_launches_or_spans_them(monkeypatch):
    def event(key, kind, host, there, annotation=False):
        return types.SimpleNamespace(
            key=key,
            count=6,
            device_type=kind,
            self_cpu_time_total=host,
            self_device_time_total=there,
            is_user_annotation=annotation,
        )

    events = [
        event("aten::mm", DeviceType.CPU, 500, 3000),
        event("gemm", DeviceType.PrivateUse1, 0, 3000),
        event("softmax", DeviceType.PrivateUse1, 0, 9000),
        event("region", DeviceType.PrivateUse1, 0, 12000, annotation=True),
    ]

    class Profile:
        def __init__(self, **options):
            self.key_averages = lambda: events

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("torch.profiler.profile", Profile)
    listed, _ = operators.profiled(lambda: torch.zeros(()))
    assert listed == [operators.Operator("softmax", 2, 3, 0.75), operators.Operator("gemm", 2, 1, 0.25)]


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "float16", 312e12),
        ("NVIDIA A100 80GB PCIe", "float16", 312e12),
        ("NVIDIA H100 PCIe", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        (None, "bfloat16", None),
    ],
)
def test_the_datasheet_s_peak_is_by_name_and_precision(monkeypatch, name, precision, peak):
    monkeypatch.setattr(device, "_call", lambda row, function: name)
    assert device.datasheet_peak(device.DEVICES["cuda"], precision) == peak
    assert device.datasheet_peak(device.DEVICES["cpu"], precision) is None


def test_the_seconds_of_updates_are_known_and_their_results_are_the_same():
    work = work_of("--warmup_steps=0", "--learning_rate=1", "--weight_decay=0.1")
    params, batch = workload.parameters(work), workload.random_batch(work, 4)
    optimizer, found = workload.timed(work.optimizer)
    losses = []
    for each in (work, work._replace(optimizer=optimizer)):
        call, _ = workload.training(each, tree.clone(params), batch)
        losses.append([float(call()) for _ in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
    assert len(found) == 3
    assert min(found) > 0


def test_an_update_s_seconds_are_those_between_two_waits(clock):
    def update(grads, opt_state, params, step, *, finite):
        clock.time += 2 + finite
        return params, opt_state

    optimizer, found = workload.timed(work_of().optimizer._replace(update=update))
    leaves = {"a": torch.zeros(2)}
    assert optimizer.update(leaves, {}, leaves, torch.tensor(0), finite=1) == (leaves, {})
    assert found == [3]


def test_backward_is_what_forward_and_update_leave(monkeypatch):
    updates = []

    def steady(calls, *_):
        updates[:] = [0.002] * 3
        return {"train": [0.010] * 3, "update": [0.012] * 3, "forward": [0.003] * 3}

    monkeypatch.setattr(workload, "timed", lambda optimizer: (optimizer, updates))
    monkeypatch.setattr(bench_measures, "steady", steady)
    found = bench_measures._parts(work_of())
    assert found["milliseconds"] == pytest.approx({"forward": 3, "backward": 5, "update": 2})
    assert found["shares"] == pytest.approx({"forward": 0.3, "backward": 0.5, "update": 0.2})
    assert found["fused_attention"] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]


def test_mfu_is_the_model_s_operations_over_the_larger_ceiling(monkeypatch):
    ceilings = iter([1e9, 4e9])
    monkeypatch.setattr(workload, "ceiling", lambda work: next(ceilings))
    monkeypatch.setattr(bench_measures, "steady", lambda *_: {"train": [0.5] * 3})
    monkeypatch.setattr(device, "datasheet_peak", lambda row, precision: 8e9)
    found = bench_measures._step(work_of(), training=True)
    counted = workload.operations(work_of(), training=True)
    assert found["images_per_second"] == 8
    assert found["operations_per_second"] == {"ceiling": 4e9, "datasheet": 8e9}
    assert found["utilisation"] == {
        "mfu": counted["model"] * 8 / 4e9,
        "needed": counted["needed"] * 8 / 4e9,
        "mfu_of_datasheet": counted["model"] * 8 / 8e9,
    }


@pytest.mark.parametrize("argv", [["--model_type=R50-ViT-B_16", "--img_size=224"], ["--freeze=(?!head/).*"]])
def test_of_a_stem_and_of_frozen_leaves_no_operations_are_counted(argv):
    assert workload.operations(work_of(*argv), training=True) is None


def test_one_thing_is_measured_in_this_process(tmp_path, capsys):
    report = benched(tmp_path, *OFF, "--what=train", "--optimizer=adamw", "--dropout_rate=0.1")
    train = report["train"]
    assert report["optimizer"] == "adamw"
    assert report["model"]["dropout_rate"] == 0.1
    assert train["form"] == "off"
    assert train["milliseconds"]["lower"] <= train["milliseconds"]["median"] <= train["milliseconds"]["upper"]
    assert train["images_per_second"] * train["milliseconds"]["median"] == pytest.approx(1000 * 4)
    assert 0 < train["utilisation"]["needed"] < train["utilisation"]["mfu"] < 1
    out = capsys.readouterr().out
    assert re.search(r"^model +ViT-Nano_8, [\d,]+ parameters, 32x32 pixels, 17 tokens$", out, re.M)
    assert re.search(r"^train +[\d.]+ ms .*images/s, batches of 4, compile=off$", out, re.M)
    assert re.search(r"^train MFU +[\d.]+% of [\d.]+ T operations/s, measured; ", out, re.M)


@pytest.mark.parametrize(("argv", "batch"), [([], 4), (["--eval_batch_size=2"], 2)])
def test_the_eval_step_takes_the_train_step_s_batches_unless_told_otherwise(tmp_path, argv, batch):
    assert benched(tmp_path, *OFF, "--what=eval", *argv)["eval"]["batch_size"] == batch


def test_a_recipe_s_flagfile_is_one_to_measure(tmp_path):
    flagfile = f"--flagfile={ROOT / 'flags/quickstart.flags'}"
    report = benched(tmp_path, flagfile, *OFF, "--what=input")
    assert report["input"]["dataset"] == "digits"
    assert report["input"]["images_per_second"] * report["input"]["milliseconds"]["median"] == pytest.approx(1000 * 4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--what=train,speed"], "vitfn: --what: found 'speed', expected some of train,eval,input,compile,parts"),
        (["--what="], "vitfn: --what: found '', expected some of train,eval,input,compile,parts"),
        (["--rounds=2"], "vitfn: flag --rounds=2: "),
        (["--img_size=33"], "vitfn: --model_type=ViT-Nano_8 --img_size=33: "),
        (["--what=input", "--dataset=folder", "--data_dir=absent"], "vitfn: "),
    ],
)
def test_what_is_wrong_is_one_line(argv, message, capsys):
    assert bench.main(["bench", *OFF, *argv]) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if not line.startswith("vitfn: measuring")]
    assert out == ""
    assert len(said) == 1
    assert said[0].startswith(message)


def test_a_process_that_is_killed_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=-9))
    assert bench.main(["bench", *OFF, "--what=train,eval"]) == 1
    assert capsys.readouterr().err.startswith("vitfn: --what=train: signal 9 ended its process")


def test_what_a_process_dies_of_is_said_once(tmp_path):
    done = python("-m", "vitfn.bench", *OFF, "--what=input,train", "--dataset=folder", f"--data_dir={tmp_path}/absent")
    assert done.returncode == 2
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if not line.startswith("vitfn: measuring")]
    assert len(said) == 1
    assert "absent" in said[0]


def test_it_is_light_to_import():
    heavy = ("torch._inductor", "torch._dynamo", "matplotlib", "sklearn")
    done = python("-c", f"import sys, vitfn.bench; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_of_two_things_each_is_measured_in_a_process_of_its_own(tmp_path, capfd):
    report = benched(tmp_path, *OFF, "--what=input,eval")
    assert report["input"]["dataset"] == "digits"
    assert report["eval"]["form"] == "off"
    assert {"train", "compile", "parts"}.isdisjoint(report)
    out = capfd.readouterr().out
    assert re.search(r"^input +\S", out, re.M)
    assert re.search(r"^eval +\S", out, re.M)


@pytest.mark.slow
def test_everything_is_measured_and_agrees_with_itself(tmp_path):
    done = python("-m", "vitfn.bench", *OFF, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {"train", "eval", "input", "compile", "parts"} <= report.keys()
    for name in ("train", "eval", "input"):
        found = report[name]
        assert found["images_per_second"] * found["milliseconds"]["median"] == pytest.approx(1000 * 4)
    for name in ("train", "eval"):
        used, counted, peak = (
            report[name][key] for key in ("utilisation", "operations_per_image", "operations_per_second")
        )
        assert used["mfu"] == pytest.approx(counted["model"] * report[name]["images_per_second"] / peak["ceiling"])
        assert used["mfu_of_datasheet"] is None
        assert report[name]["peak_memory"]["of"] == "process"
        assert report[name]["peak_memory"]["bytes"] > 0
    share = report["input"]["milliseconds"]["median"] / report["train"]["milliseconds"]["median"]
    assert report["input"]["share_of_train_step"] == pytest.approx(share)
    parts = report["parts"]
    assert sum(parts["shares"].values()) == pytest.approx(1)
    assert sum(each["share"] for each in parts["operators"]) == pytest.approx(1)
    with open(tmp_path / "profile.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [each["name"] for each in parts["operators"]]
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-3)
    assert report["versions"]["torch"] == torch.__version__
    for word in ("model", "device", "train", "eval", "input", "compile", "parts", "attention"):
        assert re.search(rf"^{word} +\S", done.stdout, re.M), word


@pytest.mark.slow
def test_compiling_is_timed_with_empty_caches_and_with_those_it_leaves(tmp_path, monkeypatch):
    """The second process finds what the first has compiled."""
    kept, run = [], subprocess.run

    def watched(words, **options):
        if "vitfn.bench" in words:  # and not one of the standard library's
            folder = Path(options["env"]["TORCHINDUCTOR_CACHE_DIR"])
            kept.append(sum(1 for path in folder.rglob("*") if path.is_file()))
        return run(words, **options)

    monkeypatch.setattr(subprocess, "run", watched)
    report = benched(tmp_path, *NANO, "--compile=block", "--what=compile")
    assert report["compile"]["form"] == "block"
    assert min(report["compile"]["seconds"].values()) > 0
    assert kept[0] == 0 < kept[1]


@pytest.mark.slow
def test_a_device_counts_its_own_memory(sdaa, tmp_path):
    argv = [word for word in OFF if not word.startswith("--device")]
    done = sdaa(["-m", "vitfn.bench", *argv, "--device=sdaa", "--what=train,parts", f"--out={tmp_path}"])
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["device"] == "sdaa"
    assert report["precision"] == "float16"
    assert report["train"]["peak_memory"]["of"] == "device"
    assert report["train"]["peak_memory"]["bytes"] > 3 * 4 * report["model"]["parameters"]
    assert sum(report["parts"]["shares"].values()) == pytest.approx(1)
