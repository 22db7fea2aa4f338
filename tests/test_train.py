"""The command: `python -m vitfn.train`, its errors, its files, and that a run can be had again."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from absl.flags import FlagValues
from conftest import ROOT, SMALL
from test_data import FOREIGN, cifar_contents, write_cifar

import vitfn
from vitfn import flags, train, weights
from vitfn.errors import InputError

MODEL = "ViT-Nano_8"
TINY = [
    "--dataset=digits",
    f"--model_type={MODEL}",
    "--img_size=32",
    "--pretrained_dir=",
    "--train_batch_size=16",
    "--num_steps=3",
    "--warmup_steps=1",
    "--eval_batch_size=64",
    "--compile=off",
    "--device=cpu",
]
RUN = [*TINY, "--name=run"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def python(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    """A Python of its own."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done


def all_flags() -> FlagValues:
    fv = FlagValues()
    for group in flags.TRAIN:
        group(fv)
    return fv


# --- what is refused: exit code 2, one line on stderr, no run directory


@pytest.fixture
def refusal(capsys):
    """A function: the line that the command prints for these flags, after those of a run that would work."""

    def line_of(*argv: str, base: list[str] = RUN) -> str:
        assert train.main(["train", *base, *argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("vitfn: ")
        assert "Traceback" not in err
        assert not Path("output/run").exists()
        return err

    return line_of


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--model_type=ViT-X_16", ["model_type", "'ViT-X_16'", "ViT-B_16"]),
        ("--dataset=mnist", ["--dataset", "mnist", "cifar100"]),
        ("--device=tpu", ["--device", "'tpu'", "cuda, cpu"]),
        ("--no_such_flag=1", ["no_such_flag"]),
        ("--nmae=x", ["nmae", "name"]),
        ("stray", ["stray", "--flag=value"]),
        ("--img_size=30", ["img_size", "30x30", "patch size 8"]),
        ("--img_size=0", ["img_size", "0x0", "patch size 8"]),
        ("--img_size=32x30", ["img_size", "32x30", "patch size 8"]),
        ("--img_size=big", ["--img_size", "big", "HEIGHTxWIDTH"]),
        ("--img_size=32x32x3", ["--img_size", "32x32x3", "HEIGHTxWIDTH"]),
        ("--train_batch_size=0", ["--train_batch_size", "0", "positive"]),
        ("--train_batch_size=1439", ["--train_batch_size", "1439", "1438"]),
        ("--eval_batch_size=0", ["--eval_batch_size", "0", "positive"]),
        ("--eval_every=0", ["--eval_every", "0", "positive"]),
        ("--num_steps=-1", ["--num_steps", "-1"]),
        ("--num_steps=many", ["--num_steps", "many"]),
        ("--precision=float8", ["--precision", "float8", "bfloat16"]),
        ("--compile=all", ["--compile", "all", "block"]),
        ("--optimizer=lion", ["--optimizer", "lion", "adamw"]),
        ("--dropout_rate=1", ["dropout_rate", "1"]),
        ("--dropout_rate=1.5", ["--dropout_rate", "1.5"]),
        ("--crop_min=2", ["--crop_min", "2", "1"]),
        ("--learning_rate=-1", ["--learning_rate", "-1"]),
        ("--learning_rate=nan", ["--learning_rate", "nan"]),
        ("--max_grad_norm=-1", ["--max_grad_norm", "-1"]),
        ("--max_grad_norm=0", ["--max_grad_norm", "0", "above 0"]),
        ("--gradient_accumulation_steps=3", ["--train_batch_size", "16", "multiple of", "3"]),
        ("--gradient_accumulation_steps=0", ["--gradient_accumulation_steps", "0"]),
        ("--loss_scale=128", ["--loss_scale", "128", "--precision=float16"]),
        ("--ema=1", ["--ema", "1", "below 1"]),
        ("--ema=nan", ["--ema", "nan"]),
        ("--layer_decay=0", ["--layer_decay", "above 0"]),
        ("--momentum_dtype=float16", ["--momentum_dtype", "float16", "bfloat16"]),
        ("--train_fraction=0", ["--train_fraction", "0", "above 0"]),
        ("--freeze=(", ["--freeze", "regular expression"]),
        ("--randaugment=2", ["--randaugment", "2", "two integers"]),
        ("--randaugment=0,10", ["--randaugment", "0,10", "at least 1"]),
        ("--keep_checkpoints=0", ["--keep_checkpoints", "0"]),
        ("--checkpoint_every=-1", ["--checkpoint_every", "-1"]),
        ("--local_rank=1", ["--local_rank=1", "no WORLD_SIZE", "start it with torchrun"]),
        ("--name=", ["--name", "none"]),
        ("--name=../elsewhere", ["--name", "../elsewhere", "--output_dir"]),
        ("--crop_min=nan", ["--crop_min", "nan"]),
        ("--flagfile=absent.flags", ["flagfile", "absent.flags"]),
        ("--pretrained_dir=absent.npz", ["absent.npz", "No such file"]),
        ("--pretrained_dir=/", ["/: found a folder without weights", "model.npz"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_found_and_expected(refusal, flag, parts):
    line = refusal(*flag.split(" "))
    for part in parts:
        assert part in line


def test_a_missing_name_is_asked_for(refusal):
    assert "--name" in refusal(base=TINY)


def test_fp16_contradicts_another_precision(refusal):
    line = refusal("--fp16", "--precision=bfloat16")
    assert "--fp16" in line
    assert "--precision=bfloat16" in line


def test_fp16_is_precision_float16(refusal, monkeypatch):
    def refuse(*_, precision, **__):
        raise InputError(f"precision is {precision}")

    monkeypatch.setattr(train, "make_train_step", refuse)
    assert "precision is float16" in refusal("--fp16")
    assert "precision is float32" in refusal()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_that_is_not_there(refusal):
    line = refusal("--device=cuda")
    assert "--device: found 'cuda'" in line
    assert "auto, cpu" in line


def test_an_existing_run_directory_is_refused_and_left_alone(capsys):
    Path("output/run").mkdir(parents=True)
    Path("output/run/model.npz").write_bytes(b"precious")
    assert train.main(["train", *RUN]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--name=run" in err
    assert "output/run" in err
    assert "--resume" in err
    assert {p.name: p.read_bytes() for p in Path("output/run").iterdir()} == {"model.npz": b"precious"}


def test_an_output_directory_that_is_a_file_is_refused(refusal):
    Path("a_file").write_text("")
    assert "a_file" in refusal("--output_dir=a_file")


def _whole(path: Path) -> None:
    np.savez(path, **{"head/kernel": np.zeros((1000, 10), np.float32)})


def _truncated(path: Path) -> None:
    _whole(path)
    path.write_bytes(path.read_bytes()[:-5000])


def _objects(path: Path) -> None:
    np.savez(path, **{"head/kernel": np.array([{"a": 1}], dtype=object)})


WRONG_WEIGHTS = {
    "truncated": (_truncated, "cut off"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html></html>"), "web page"),
    "git-LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "git lfs pull",
    ),
    "no ZIP": (lambda path: path.write_bytes(b"\x93NUMPY" + b"\0" * 100), "106 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "objects": (_objects, "head/kernel"),
    "another model": (_whole, "found arrays (head/kernel)"),
    "another size": (lambda path: vitfn.save_npz(path, vitfn.init(SMALL), SMALL), "expected"),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_a_wrong_file_of_weights_is_named(refusal, wrong):
    write, part = WRONG_WEIGHTS[wrong]
    write(Path("wrong.npz"))
    line = refusal("--pretrained_dir=wrong.npz")
    assert "wrong.npz: " in line
    assert part in line


@pytest.mark.parametrize("call", FOREIGN)
def test_a_cifar_archive_with_a_foreign_pickle_is_refused(refusal, call):
    marker = Path("executed").absolute()
    write_cifar(Path("data"), cifar_contents() | {"data_batch_1": FOREIGN[call](str(marker))})
    assert "data/cifar-10-python.tar.gz/data_batch_1" in refusal("--dataset=cifar10")
    assert not marker.exists()


def test_an_absent_cifar_is_told_how_to_get(refusal):
    line = refusal("--dataset=cifar10", "--data_dir=nowhere")
    for part in ("nowhere", "cifar-10-python.tar.gz", "--download"):
        assert part in line


def test_the_seed_s_own_command_line_lacks_nothing_but_the_weights(refusal):
    write_cifar(Path("data"), cifar_contents(per_batch=13))
    seed = """--name cifar10-100_500 --dataset cifar10 --model_type ViT-B_16
        --pretrained_dir checkpoint/ViT-B_16.npz --train_batch_size 64 --fp16_opt_level 01 --num_steps 100"""
    assert "checkpoint/ViT-B_16.npz: " in refusal(base=seed.split())
    assert not Path("output").exists()


@pytest.mark.slow
def test_a_process_says_one_line_and_exits_with_2(tmp_path):
    """Of a run that is wrong, nothing is said beside what is wrong: no hint at a long warm-up."""
    wrong = ["--name=run", "--dataset=digits", "--num_steps=100", "--pretrained_dir=absent.npz"]
    done = python("-m", "vitfn.train", *wrong, cwd=tmp_path, code=2)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "absent.npz" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- help and imports


def test_help_lists_every_flag_with_its_text(capsys):
    assert train.main(["train", "--help"]) == 0
    text, fv = "".join(capsys.readouterr().out.split()), all_flags()  # however the lines are broken
    assert len(list(fv)) > 30
    for name in fv:
        assert fv[name].help != "(no help available)", name
        assert f"--{name}:" in text or f"--[no]{name}:" in text
        assert "".join(fv[name].help.split()) in text, name


@pytest.mark.slow
def test_importing_registers_no_flag_and_loads_nothing_heavy(tmp_path):
    code = """if True:
        import sys
        from absl import flags
        before = set(flags.FLAGS)
        import vitfn
        print(sorted({"sklearn", "matplotlib", "torch._inductor", "torch._dynamo"} & sys.modules.keys()))
        import vitfn.train
        print(sorted(set(flags.FLAGS) - before))
    """
    assert python("-c", code, cwd=tmp_path).stdout.splitlines() == ["[]", "[]"]


# --- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The directory of a run of three steps, and what it printed."""
    cwd = tmp_path_factory.mktemp("finished")
    done = python("-m", "vitfn.train", *RUN, "--flip", cwd=cwd)
    return cwd / "output" / "run", done


def metrics_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_s_files(finished):
    files = {"config.json", "metrics.jsonl", "model.npz", "best.npz", "checkpoints", "report.html"}
    assert {path.name for path in finished[0].iterdir()} == files
    assert [path.name for path in (finished[0] / "checkpoints").iterdir()] == ["step_00000003.npz"]


@pytest.mark.slow
def test_config_json_holds_every_flag_at_the_top(finished):
    config = json.loads((finished[0] / "config.json").read_text())
    fv = all_flags()
    fv(["train", *RUN, "--flip"])
    want = fv.flag_values_dict()
    assert len(want) > 30
    assert {name: config[name] for name in want} == want
    assert config["resolved"]["compile"]["train"]["form"] == "off"
    assert (config["resolved"]["device"], config["resolved"]["precision"]) == ("cpu", "float32")
    assert config["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_metrics_of_every_step(finished):
    lines = metrics_of(finished[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    *steps, last = lines
    for line in steps:
        assert line.keys() >= {"train/loss", "train/grad_norm", "train/learning_rate", "train/images_per_second"}
        assert all(math.isfinite(value) for value in line.values())
        assert line["train/images_per_second"] > 0
        assert 0 < line["train/waiting"] < 1
    assert steps[0]["train/loss"] == pytest.approx(math.log(10), rel=1e-6)  # of a head of zeros
    rates = [line["train/learning_rate"] for line in steps]
    assert rates == pytest.approx([0, 0.03, 0.015], rel=1e-6)  # one step of warm-up, half a cosine of two
    assert last["eval/count"] == 359
    assert last["eval/accuracy"] == last["eval/correct"] / 359
    assert 0 < last["eval/loss"] < 10


@pytest.mark.slow
def test_the_model_of_a_run_can_be_loaded(finished):
    path = finished[0] / "model.npz"
    config, class_names, stated = weights.describe(path)
    assert stated
    assert config == vitfn.get_config(MODEL, image_size=32, num_classes=10)
    assert class_names == tuple("0123456789")
    params = vitfn.load_npz(path)
    assert vitfn.apply(params, torch.zeros(1, 3, 32, 32), config).shape == (1, 10)
    assert float(params["head"]["kernel"].abs().max()) > 0


@pytest.mark.slow
def test_what_a_run_prints(finished):
    directory, done = finished
    accuracy = metrics_of(directory)[-1]["eval/accuracy"]
    shapes = vitfn.shapes(vitfn.get_config(MODEL, image_size=32, num_classes=10)).values()
    model = f"{MODEL}, {sum(map(math.prod, shapes)):,} parameters, from random weights"
    for part in (model, "1,438 training and 359 test", f"{accuracy:.2%}", "output/run"):
        assert part in done.stdout
    assert "training: 100%" in done.stderr  # the bar
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_the_same_run_by_a_flagfile_gives_the_same_bytes(finished, tmp_path):
    (tmp_path / "tiny.flags").write_text("# the same run\n" + "\n".join([*RUN, "--flip"]) + "\n")
    python("-m", "vitfn.train", "--flagfile=tiny.flags", cwd=tmp_path)
    again = tmp_path / "output" / "run"
    assert (again / "model.npz").read_bytes() == (finished[0] / "model.npz").read_bytes()
    kept = ("step", "train/loss", "train/grad_norm", "eval/loss", "eval/accuracy")
    one, other = ([{k: line.get(k) for k in kept} for line in metrics_of(d)] for d in (again, finished[0]))
    assert one == other


@pytest.mark.slow
def test_num_steps_0_evaluates_a_model_and_writes_none(finished, capsys):
    directory = finished[0]
    assert train.main(["train", *RUN, "--num_steps=0", f"--pretrained_dir={directory / 'model.npz'}"]) == 0
    (line,) = metrics_of(Path("output/run"))
    trained = metrics_of(directory)[-1]
    assert line["step"] == 0
    assert line["eval/accuracy"] == trained["eval/accuracy"]
    assert line["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-5)
    assert {path.name for path in Path("output/run").iterdir()} == {"config.json", "metrics.jsonl", "report.html"}
    assert f"{trained['eval/accuracy']:.2%}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_flag_after_the_flagfile_wins_and_a_long_warm_up_is_a_warning(caplog):
    Path("tiny.flags").write_text("\n".join(RUN) + "\n")
    argv = ["train", "--flagfile=tiny.flags", "--num_steps=1", "--warmup_steps=500", "--eval_batch_size=359"]
    assert train.main(argv) == 0
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.name == "vitfn"
    assert "--warmup_steps=500" in record.message
    assert "--num_steps=1" in record.message
    assert [line["step"] for line in metrics_of(Path("output/run"))] == [1, 1]
    assert Path("output/run/model.npz").exists()


def test_a_warning_during_training_is_said_once(monkeypatch, capsys):
    """Above the bar, and not by the root logger again."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert train.main(["train", *RUN, "--learning_rate=1e30", "--num_steps=4", "--noreport"]) == 0
    said = [line.rsplit("vitfn: ")[-1] for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert said
    assert len(said) == len(set(said))
    assert said[0].startswith("step 3: ") or said[0].startswith("step 4: ")
