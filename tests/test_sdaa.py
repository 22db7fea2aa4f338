"""The commands on a simulated SDAA card (tests/simulated), as a user of one gives them; and what a step sends to it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NANO, ROOT
from simulated.running import variables
from test_parallel import together

pytestmark = pytest.mark.oldest


RUN = [
    *NANO,
    "--num_steps=40",
    "--warmup_steps=4",
    "--eval_every=20",
    "--noreport",
    "--seed=1",  # with others (42, 3) a gradient leaves float16's range, and that update is skipped
]
SHORT = [*RUN, "--num_steps=2", "--eval_batch_size=359"]
EVERYTHING = [*RUN, "--gradient_accumulation_steps=2", "--optimizer=adamw", "--learning_rate=0.001", "--ema=0.9"]
EVERYTHING += ["--dropout_rate=0.1", "--stochastic_depth=0.1", "--flip", "--mixup=0.2", "--erasing=0.2"]
CARD = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]


@pytest.fixture(scope="module")
def train(sdaa, tmp_path_factory):
    """A function: trains under a name, and returns the run's directory, stdout and stderr."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *argv: str, launcher: list[str] | None = None, code: int = 0, **env: str):
        words = [*(launcher or []), "-m", "vitfn.train", *argv, f"--name={name}", f"--output_dir={folder}"]
        done = sdaa(words, **env)
        assert done.returncode == code, done.stderr
        return folder / name, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def float32(train) -> Path:
    """A run in float32 on one device, with a block compiled."""
    return train("float32", *RUN, "--device=sdaa", "--precision=float32")[0]


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> np.ndarray:
    return np.array([row["train/loss"] for row in logged(run) if "train/loss" in row])


def accuracy(run: Path) -> float:
    return next(row["eval/accuracy"] for row in reversed(logged(run)) if "eval/accuracy" in row)


def relative_error(run: Path, reference: Path) -> float:
    """Unsigned and mean, of all losses."""
    a, b = losses(run), losses(reference)
    assert len(a) == len(b) == 40
    return float((abs(a - b) / abs(b)).mean())


def resolved(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())["resolved"]


@pytest.mark.slow
def test_float32_is_the_cpu_s_curve(train, float32):
    cpu, _, _ = train("cpu", *RUN, "--device=cpu", "--compile=off")
    assert relative_error(float32, cpu) <= 1e-6
    assert resolved(float32)["compile"]["train"] == {"form": "block", "failures": {}}
    assert resolved(float32)["device_name"] == "/dev/tcaicard0"


@pytest.mark.slow
def test_auto_takes_the_card_and_makes_the_same_bits_under_the_seed_s_migration(train, float32):
    """TORCH_SDAA_AUTOLOAD=cuda_migrate, which makes torch say that there is CUDA, changes nothing."""
    again, _, _ = train("again", *RUN, "--precision=float32", TORCH_SDAA_AUTOLOAD="cuda_migrate")
    assert (again / "model.npz").read_bytes() == (float32 / "model.npz").read_bytes()
    assert (losses(again) == losses(float32)).all()
    assert resolved(again)["device"] == "sdaa"
    assert resolved(again)["environment"]["TORCH_SDAA_AUTOLOAD"] == "cuda_migrate"


@pytest.mark.slow
def test_auto_s_precision_is_float16_with_a_scale_that_adapts_itself(train, float32):
    half, stdout, _ = train("half", *RUN, "--device=sdaa")
    assert 0 < relative_error(half, float32) <= 3e-4
    assert re.search(r"^device +sdaa, float16, compile=block$", stdout, re.M)
    assert re.search(r"^peak memory +\d+ MiB of the device$", stdout, re.M)
    assert logged(half)[0]["train/loss_scale"] == 65536


@pytest.mark.slow
def test_four_devices_make_the_curve_of_one(train, float32):
    argv = [*RUN, "--device=sdaa", "--precision=float32", "--tcap_log"]
    four, stdout, _ = train("four", *argv, launcher=CARD)
    assert relative_error(four, float32) <= 1e-6
    assert accuracy(four) == accuracy(float32)
    assert re.search(r"^devices +4, 4 images of a batch each, data=4,shard=1$", stdout, re.M)
    assert len(re.findall(r"rank : 0  train.loss : [\d.e-]+  train.ips : [\d.]+ imgs/s", stdout)) == 40
    assert "rank : 1" not in stdout


@pytest.mark.slow
def test_four_devices_share_one_model_and_its_checkpoint_becomes_a_file(sdaa, float32):
    """By TCCL's plain collectives: functional ones are not for such a device on torch 2.7."""
    run = float32.with_name("shared")
    argv = ["-m", "vitfn.train", *RUN, "--name=shared", f"--output_dir={run.parent}", "--device=sdaa"]
    argv += ["--precision=float32", "--compile=off", "--checkpoint_every=20"]
    together(ROOT, 4, *argv, "--mesh=shard=4", **variables())
    assert relative_error(run, float32) <= 1e-6
    assert accuracy(run) == accuracy(float32)
    shutil.rmtree(run / "checkpoints/step_00000040")
    together(ROOT, 4, *argv, "--mesh=data=2,shard=2", "--resume", **variables())
    assert relative_error(run, float32) <= 1e-6
    gathered = run / "gathered.npz"
    done = sdaa(["-m", "vitfn.convert", str(run / "checkpoints/step_00000040"), str(gathered)])
    assert done.returncode == 0, done.stderr
    assert gathered.read_bytes() == (run / "model.npz").read_bytes()


@pytest.mark.slow
def test_two_visible_devices_are_too_few_for_four_processes(train):
    run, _, stderr = train("few", *SHORT, "--device=sdaa", launcher=CARD, code=1, SDAA_VISIBLE_DEVICES="0,1")
    assert re.search(r"^vitfn, process [23]: --device=sdaa: found 2 of them, too few for process [23]", stderr, re.M)
    assert not run.exists()


@pytest.mark.slow
def test_everything_at_once_in_float16_goes_on_after_a_stop_and_is_evaluated(train, sdaa):
    """From a checkpoint in the middle to the same bits; vitfn.evaluate then says what the run said, and no more."""
    argv = [*EVERYTHING, "--device=sdaa", "--checkpoint_every=15", "--keep_checkpoints=9"]
    whole, _, _ = train("whole", *argv)
    assert np.isfinite(losses(whole)).all()
    rest = whole.with_name("rest")
    shutil.copytree(whole, rest)
    for file in ("model.npz", "best.npz", "checkpoints/step_00000030.npz", "checkpoints/step_00000040.npz"):
        (rest / file).unlink(missing_ok=True)
    config = json.loads((rest / "config.json").read_text())
    (rest / "config.json").write_text(json.dumps(config | {"name": "rest"}))
    train("rest", *argv, "--resume")
    assert (rest / "model.npz").read_bytes() == (whole / "model.npz").read_bytes()
    assert (losses(rest) == losses(whole)).all()
    done = sdaa(["-m", "vitfn.evaluate", str(rest)])
    assert done.returncode == 0, done.stderr
    assert re.match(rf"model +\S+model.npz\naccuracy +{accuracy(whole):.2%} ", done.stdout)
    assert "Host IP" in done.stderr  # the banner, which is no data


@pytest.mark.parametrize(
    ("asked", "defect", "failed", "form"),
    [
        ("auto", "L1", ["block"], "off"),
        pytest.param("auto", "L5", ["block"], "off", marks=pytest.mark.slow),
        pytest.param("step", "L4:300", ["step"], "block", marks=pytest.mark.slow),
        pytest.param("step", "L3", ["step", "block"], "off", marks=pytest.mark.slow),
    ],
)
def test_a_compiler_that_fails_is_reported_and_the_run_goes_on(train, asked, defect, failed, form):
    argv = [*SHORT, "--device=sdaa", f"--compile={asked}", "--report"]
    name = f"defect_{asked}_{defect.replace(':', '_')}"
    run, stdout, stderr = train(name, *argv, SIMULATED_SDAA_DEFECT=defect)
    assert stderr.count("COMPILING FAILED") == 1
    assert resolved(run)["compile"]["train"]["form"] == form
    assert list(resolved(run)["compile"]["train"]["failures"]) == failed
    assert f"compile={form}, " + ", ".join(f"{each} failed" for each in failed) in stdout
    page = (run / "report.html").read_text()
    for each in failed:
        assert f"compile={each} failed for the train step, which went on with compile={form}" in page


@pytest.mark.slow
def test_a_whole_step_in_float16_is_compiled_where_torch_can(train, float32):
    """torch 2.7's torch.func does not differentiate the casts of such a device: a block is compiled instead."""
    run, _, stderr = train("step", *RUN, "--device=sdaa", "--compile=step")
    form = "step" if torch.__version__ >= "2.13" else "block"
    assert resolved(run)["compile"]["train"]["form"] == form
    assert stderr.count("COMPILING FAILED") == (form != "step")
    assert relative_error(run, float32) <= 3e-4


@pytest.mark.slow
def test_without_a_fallback_a_compiler_that_fails_ends_the_run(train):
    argv = [*SHORT, "--device=sdaa", "--nocompile_fallback"]
    run, stdout, stderr = train("strict", *argv, code=1, SIMULATED_SDAA_DEFECT="L2")
    assert re.search(r"^vitfn: compile=block failed on sdaa: .*multi_processor_count", stderr, re.M)
    assert "Traceback" not in stderr
    assert stdout == ""
    assert not (run / "model.npz").exists()


OPERATORS = """if True:
    import torch, torch_sdaa, vitfn
    from vitfn import scaling

    config = vitfn.ViTConfig(
        name="small", patch_size=8, image_size=16, hidden_size=24, num_layers=2, num_heads=2, mlp_dim=48, num_classes=5,
        {options}
    )
    rate = vitfn.warmup_cosine(0.01, 10, 2)
    for optimizer in (vitfn.sgd(rate, weight_decay=0.1), vitfn.with_ema(vitfn.adamw(rate, weight_decay=0.1), 0.9)):
        params = vitfn.init(config, 0)
        step = vitfn.make_train_step(config, optimizer, compile="{form}", precision="{precision}", accumulation_steps=2,
                                     label_smoothing=0.1)
        scales = scaling.init("cpu")
        state = [params, optimizer.init(params), scales if "{precision}" == "float16" else None]
        there = [None if part is None else vitfn.tree.to(part, "sdaa") for part in state]
        images, labels = torch.randn(4, 3, 16, 16).to("sdaa"), torch.tensor([0, 1, 2, 3]).to("sdaa")
        state = vitfn.TrainState(torch.tensor(0).to("sdaa"), *there)
        state, metrics = step(state, (images, labels))
        assert step.form == "{form}", step.failures
"""
ALL_DROPOUT = "dropout_rate=0.1, attention_dropout_rate=0.1, stochastic_depth_rate=0.1, representation_size=8"


@pytest.mark.slow
@pytest.mark.parametrize(("form", "precision"), [("off", "float32"), ("off", "float16"), ("step", "float32")])
def test_the_operators_of_a_train_step_are_those_of_the_list(sdaa, tmp_path, form, precision):
    """What a train step sends to the device, in tests/simulated/operators.txt: a new one there is a decision."""
    code = OPERATORS.format(options=ALL_DROPOUT, form=form, precision=precision)
    done = sdaa(code, SIMULATED_SDAA_OPERATORS=str(tmp_path / "operators"))
    assert done.returncode == 0, done.stderr
    found = set((tmp_path / "operators").read_text().split())
    listed = (ROOT / "tests/simulated/operators.txt").read_text().splitlines()
    allowed = {line for line in listed if line and not line.startswith("#")}
    assert len(found) > 20
    assert found <= allowed, sorted(found - allowed)
