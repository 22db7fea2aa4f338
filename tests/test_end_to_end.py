"""The commands one after the other, as a user has them: images on disk to a trained, evaluated, inspected model."""

import html.parser
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitfn
from vitfn import compare, data, evaluate, inspect, train, tree, weights
from vitfn.data import Split, digits

SMALL = ["--model_type=ViT-Nano_8", "--img_size=32", "--pretrained_dir=", "--compile=off", "--device=cpu"]
QUICK = [*SMALL, "--name=run", "--noreport", "--num_workers=0", "--warmup_steps=0"]
DIGITS = [*QUICK, "--dataset=digits", "--train_batch_size=16", "--num_steps=3", "--eval_batch_size=359"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def training(capsys):
    """A function: trains, into output/<name>; returns the lines of metrics.jsonl and what was printed."""

    def run(*argv: str, name: str = "run", code: int = 0) -> tuple[list[dict], str]:
        assert train.main(["train", *argv, f"--name={name}"]) == code, capsys.readouterr().err
        text = Path("output", name, "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()], capsys.readouterr().out

    return run


@pytest.fixture
def printed(capsys):
    """A function: runs a command that succeeds; returns what it printed."""

    def run(command, *argv: str) -> str:
        assert command.main(["command", *argv]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def losses(lines: list[dict]) -> list[float]:
    return [line["train/loss"] for line in lines if "train/loss" in line]


# --- folders of images

COLOURS = {"blue": (40, 60, 220), "grey": (128, 128, 128), "red": (220, 50, 40)}


def draw(colour: tuple[int, ...], seed: int) -> np.ndarray:
    """Noise about a colour, (H, W, C) uint8, of any size."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(24, 56, 2)
    return np.clip(rng.normal(colour, 25, (height, width, len(colour))), 0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, seed: int) -> None:
    """In one of the kinds of files that folders hold."""
    image = Image.fromarray(pixels)
    if path.parent.name == "grey":
        image.convert("L").save(path.with_suffix(".jpg" if seed % 2 else ".png"))
    elif seed % 4 == 0:
        image.convert("CMYK").save(path.with_suffix(".jpg"), quality=95)
    elif seed % 4 == 1:
        (exif := Image.Exif())[0x0112] = 6  # stored on its side
        image.save(path.with_suffix(".jpeg"), exif=exif)
    else:
        image.save(path.with_suffix(".png"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """train: 8 images of each colour, val: 3."""
    for part, count, first in (("train", 8, 0), ("val", 3, 100)):
        for place, (name, colour) in enumerate(COLOURS.items()):
            (tmp_path / "colours" / part / name).mkdir(parents=True)
            for i in range(first, first + count):
                save(tmp_path / "colours" / part / name / f"image {i}.x", draw(colour, 1000 * place + i), i)
    return tmp_path / "colours"


FOLDER = [*QUICK, "--dataset=folder", "--data_dir=colours", "--train_batch_size=12", "--eval_batch_size=4"]
LEARN = [*FOLDER, "--num_steps=25", "--optimizer=adamw", "--learning_rate=3e-3", "--crop_min=0.5"]


def test_a_folder_is_learnt_evaluated_and_inspected(folder, training, printed):
    lines, out = training(*LEARN)
    assert "folder, 24 training and 9 test images" in out
    assert lines[-1]["eval/accuracy"] >= 8 / 9
    said = printed(evaluate, "output/run")
    (accuracy,) = re.findall(r"test accuracy +(.*)", out)
    assert re.search(rf"^accuracy +{re.escape(accuracy)}$", said, re.M)
    assert "grey" in said
    assert weights.describe("output/run/model.npz").class_names == tuple(COLOURS)
    said = printed(inspect, "output/run/model.npz")
    assert re.search(r"^class names +blue, grey, red$", said, re.M)
    assert re.search(r"^classes +3$", said, re.M)


def test_the_classes_held_out_of_a_folder_without_val_are_those_evaluated_later(folder, training, printed):
    """The seed chooses them, which the run's config.json knows."""
    flags = [flag for flag in FOLDER if not flag.startswith("--data_dir")] + ["--data_dir=colours/train"]
    lines, _ = training(*flags, "--num_steps=2", "--val_fraction=0.25", "--seed=5", "--learning_rate=0.3")
    assert lines[-1]["eval/count"] == 6
    printed(evaluate, "output/run")
    found = json.loads(Path("output/run/evaluation/evaluation.json").read_text())
    assert found["loss"] == pytest.approx(lines[-1]["eval/loss"], rel=1e-6)


@pytest.mark.slow
def test_workers_change_nothing_but_the_time(folder, training):
    one, _ = training(*FOLDER, "--num_steps=3")
    two, _ = training(*FOLDER, "--num_steps=3", "--num_workers=2", name="two")
    assert losses(one) == losses(two)
    assert one[-1]["eval/loss"] == two[-1]["eval/loss"]
    assert Path("output/run/model.npz").read_bytes() == Path("output/two/model.npz").read_bytes()


def tear(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:150])
    return path


def test_torn_files_are_left_out_where_that_is_asked_for(folder, training, printed, caplog):
    torn = [tear(next((folder / part / "red").glob("*"))) for part in ("train", "val")]
    lines, out = training(*FOLDER, "--num_steps=4", "--bad_images=skip")
    assert lines[-1]["eval/count"] == 8
    assert out.rstrip().split("\n")[-2].endswith(" of 8)")
    for path in torn:
        assert sum(f"{path.relative_to(folder)}: " in record.message for record in caplog.records) >= 1
    assert " of 8)" in printed(evaluate, "output/run")


def test_a_torn_file_ends_a_run_with_one_line(folder, capsys):
    torn = tear(next((folder / "train" / "red").glob("*")))
    assert train.main(["train", *FOLDER, "--num_steps=4"]) == 2
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "vitfn: " in line]
    assert len(lines) == 1
    assert f"{torn.relative_to(folder)}: found" in lines[0]


@pytest.mark.parametrize("channels", [1, 4])
def test_images_become_of_the_channels_that_are_asked_for(folder, training, printed, channels):
    lines, _ = training(*FOLDER, f"--channels={channels}", "--num_steps=2")
    assert all(map(math.isfinite, losses(lines)))
    assert vitfn.load("output/run/model.npz")["embedding"]["kernel"].shape[2] == channels
    assert re.search(rf"^image size +32x32 px, {channels} channels", printed(inspect, "output/run/model.npz"), re.M)
    assert f"({lines[-1]['eval/correct']:.0f} of 9)" in printed(evaluate, "output/run")


# --- lists


def test_a_list_of_arrays_with_five_channels_is_learnt(training, printed, tmp_path):
    rows = ["image,label"]
    for i in range(24):
        colour = (200, 30, 30, 30, 30) if i % 2 else (30, 30, 30, 30, 200)
        np.save(tmp_path / f"{i}.npy", draw(colour, i))
        rows.append(f"{i}.npy,{'first' if i % 2 else 'last'}")
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    flags = ["--dataset=list", "--data_dir=all.csv", "--channels=5", "--val_fraction=0.25", "--eval_batch_size=6"]
    flags += ["--num_steps=15", "--optimizer=adamw", "--learning_rate=3e-3", "--train_batch_size=8"]
    lines, out = training(*QUICK, *flags)
    assert lines[-1]["eval/accuracy"] == 1
    assert "list, 18 training and 6 test images" in out
    assert "(6 of 6)" in printed(evaluate, "output/run")


def test_several_labels_an_image_are_learnt_and_measured(training, printed, tmp_path):
    """Left half red or not, right half blue or not: four kinds of images, two questions."""
    for part, count in (("train", 32), ("val", 8)):
        lines = []
        for i in range(count):
            labels = [name for name, bit in (("red", 1), ("blue", 2)) if i & bit]
            pixels = np.random.default_rng(i).integers(90, 130, (32, 32, 3)).astype(np.uint8)
            if "red" in labels:
                pixels[:, :16, 0] = 250
            if "blue" in labels:
                pixels[:, 16:, 2] = 250
            Image.fromarray(pixels).save(tmp_path / f"{part}{i}.png")
            lines.append(json.dumps({"image": f"{part}{i}.png", "labels": labels}))
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    flags = [*QUICK, "--dataset=list", "--data_dir=.", "--train_batch_size=16", "--eval_batch_size=8"]
    lines, _ = training(*flags, "--num_steps=25", "--optimizer=adamw", "--learning_rate=3e-3", "--crop_min=0.9")
    assert losses(lines)[0] == pytest.approx(2 * math.log(2), rel=1e-5)  # a sum of two, of a head of zeros
    assert lines[-1]["eval/mean_average_precision"] > 0.95
    assert lines[-1]["eval/accuracy"] >= 7 / 8
    assert "eval/top5" not in lines[-1]
    said = printed(evaluate, "output/run")
    assert re.search(rf"^mean average precision +{lines[-1]['eval/mean_average_precision']:.4f}$", said, re.M)
    files = {path.name for path in Path("output/run/evaluation").iterdir()}
    assert files == {"evaluation.json", "per_class.csv"}
    assert weights.describe("output/run/model.npz").class_names == ("blue", "red")
    assert train.main(["train", *flags, "--num_steps=1", "--loss=softmax", "--name=other"]) == 2


# --- the digits again, as files


@pytest.fixture(scope="module")
def as_files(tmp_path_factory) -> Path:
    """The digits as PNG files in folders train and val, and as lists in the order of the dataset."""
    pytest.importorskip("sklearn")
    root, dataset = tmp_path_factory.mktemp("digits"), digits.load()
    for part, split in (("train", dataset.train), ("val", dataset.test)):
        rows = ["image,label"]
        for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            path = root / part / str(label) / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            rows.append(f"{path.relative_to(root)},{label}")
        (root / f"{part}.csv").write_text("\n".join(rows) + "\n")
    return root


def by_class(split: Split) -> Split:
    """In the order of a folder: by class, and in a class as before."""
    order = split.labels.argsort(stable=True)
    return Split(split.images[order], split.labels[order])


@pytest.mark.parametrize("kind", ["list", "folder"])
def test_the_digits_as_files_give_the_losses_of_the_digits(as_files, training, monkeypatch, kind):
    if kind == "folder":
        dataset = digits.load()
        sorted_ = dataset._replace(train=by_class(dataset.train), test=by_class(dataset.test))
        monkeypatch.setitem(data.DATASETS, "digits", lambda *_, **__: sorted_)
    want, _ = training(*DIGITS, "--flip")
    found, _ = training(*DIGITS, "--flip", f"--dataset={kind}", f"--data_dir={as_files}", name="files")
    assert losses(found) == pytest.approx(losses(want), rel=1e-4)
    assert found[-1]["eval/loss"] == pytest.approx(want[-1]["eval/loss"], rel=1e-4)
    assert found[-1]["eval/count"] == 359


# --- recipes


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[float]:
    """The losses of a run without any of the flags below."""
    pytest.importorskip("sklearn")
    root = tmp_path_factory.mktemp("plain")
    assert train.main(["train", *DIGITS, f"--output_dir={root}"]) == 0
    return losses([json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()])


@pytest.mark.parametrize(
    "flags",
    [
        "--crop=google",
        "--crop_min=1",
        "--flip",
        "--randaugment=2,5",
        "--erasing=1",
        "--mixup=0.5",
        "--cutmix=1",
        "--mixup=0.5 --cutmix=1 --label_smoothing=0.1 --erasing=0.25 --loss=sigmoid",
        "--label_smoothing=0.1",
        "--loss=sigmoid",
        "--layer_decay=0.5",
        "--rate_index=seed",
        "--decay_type=linear",
        "--weight_decay=0.1",
        "--weight_decay=0.1 --decay_rule=big_vision",
        "--momentum_dtype=bfloat16",
        "--optimizer=adamw",
        "--train_fraction=0.5",
        "--stochastic_depth=0.5",
        "--dropout_rate=0.5",
        "--max_grad_norm=0.01",
        "--gelu=erf",
        "--precision=bfloat16",
    ],
)
def test_each_flag_of_a_recipe_changes_the_run(plain, training, flags):
    if "randaugment" in flags:
        pytest.importorskip("kornia")
    found, _ = training(*DIGITS, *flags.split())
    assert all(map(math.isfinite, losses(found)))
    assert losses(found) != plain


def test_the_same_flags_give_the_same_run(training):
    flags = "--mixup=0.5 --cutmix=1 --erasing=0.5 --flip --dropout_rate=0.1 --stochastic_depth=0.1 --optimizer=adamw"
    one, _ = training(*DIGITS, *flags.split())
    again, _ = training(*DIGITS, *flags.split(), name="again")
    assert losses(one) == losses(again)
    assert Path("output/run/model.npz").read_bytes() == Path("output/again/model.npz").read_bytes()


def test_a_batch_in_parts_gives_the_losses_of_the_whole(plain, training):
    parts, _ = training(*DIGITS, "--gradient_accumulation_steps=4")
    assert losses(parts) == pytest.approx(plain, rel=1e-5)


def test_linear_probing_leaves_the_trunk_as_it_was(training):
    training(*DIGITS)
    start = tree.flatten(vitfn.load("output/run/model.npz"))
    flags = [
        "--pretrained_dir=output/run/model.npz",
        "--freeze=(?!head/).*",
        "--weight_decay=0.1",
        "--learning_rate=0.5",
    ]
    training(*DIGITS, *flags, "--head=keep", name="probe")
    end = tree.flatten(vitfn.load("output/probe/model.npz"))
    assert {path for path in start if not start[path].equal(end[path])} == {"head/kernel", "head/bias"}


def test_an_average_is_what_is_evaluated_and_saved(training):
    flags = [*DIGITS, "--learning_rate=0.3"]
    last, _ = training(*flags)
    averaged, _ = training(*flags, "--ema=0.5", name="ema")
    assert losses(averaged) == losses(last)
    assert averaged[-1]["eval/loss"] != last[-1]["eval/loss"]
    one, other = (tree.flatten(vitfn.load(f"output/{name}/model.npz")) for name in ("run", "ema"))
    assert not one["head/bias"].equal(other["head/bias"])


def test_everything_at_once_learns(folder, training):
    flags = """--ema=0.8 --momentum_dtype=bfloat16 --decay_rule=big_vision --weight_decay=1e-3 --rate_index=seed
        --gradient_accumulation_steps=2 --layer_decay=0.9 --label_smoothing=0.05 --crop=google --crop_min=0.6 --flip
        --erasing=0.1 --mixup=0.1 --cutmix=0.1 --stochastic_depth=0.1 --learning_rate=0.05 --num_steps=30"""
    lines, _ = training(*FOLDER, *flags.split())
    assert lines[-1]["eval/accuracy"] >= 7 / 9


# --- what a run leaves


@pytest.fixture
def resumed(training) -> tuple[list[dict], str]:
    """A run of 6 steps whose last checkpoint was lost, gone on with from step 4: its metrics, and all it printed."""
    flags = [*DIGITS, "--num_steps=6", "--checkpoint_every=2", "--eval_every=3", "--tcap_log"]
    flags += ["--tensorboard"] if pytest.importorskip("tensorboard") else []
    _, first = training(*flags)
    Path("output/run/checkpoints/step_00000006.npz").unlink()
    lines, second = training(*flags, "--resume")
    return lines, first + second


def test_a_resumed_run_has_every_step_once_in_its_metrics(resumed, training):
    lines, _ = resumed
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    whole, _ = training(*DIGITS, "--num_steps=6", name="whole")
    assert losses(lines) == losses(whole)
    assert compare.read_curve("output/run").tolist() == losses(whole)


def test_tensorboard_reads_every_step_once(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines, _ = resumed
    events = EventAccumulator("output/run").Reload()
    for name in ("train/loss", "train/learning_rate", "eval/accuracy", "eval/loss"):
        want = [(line["step"], line[name]) for line in lines if name in line]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in want], name
        assert [value for _, value in found] == pytest.approx([value for _, value in want], rel=1e-6)


def test_the_vendor_s_lines_give_the_losses_of_the_metrics(resumed, tmp_path):
    lines, out = resumed
    iterations = [int(number) for number in re.findall(r"Iteration: (\d+)  rank : 0  train.loss", out)]
    assert iterations == [0, 1, 2, 3, 4, 5, 4, 5]  # the second part after the first
    Path("sdaa.log").write_text(out)
    want = losses(lines)
    assert compare.read_curve("sdaa.log").tolist() == [*want, *want[4:]]
    theirs = [float(found) for found in re.findall(r"rank : 0  train.loss : ([\d\.e-]+)", out)]  # loss.py's own
    assert theirs == [*want, *want[4:]]
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}"
    line = rf"TCAPPDLL {date} - Epoch: 0 Iteration: 0  rank : 0  train\.loss : {want[0]}  train\.ips : [\d.]+ imgs/s"
    assert re.fullmatch(line, out.splitlines()[0])


def test_two_runs_are_compared(training, capsys):
    training(*DIGITS)
    training(*DIGITS, "--seed=1", "--learning_rate=1", name="other")
    assert compare.main(["compare", "output/run", "output/run"]) == 0
    assert re.search(r"verdict +within", capsys.readouterr().out)
    assert compare.main(["compare", "output/run", "output/other"]) == 1
    assert re.search(r"verdict +BEYOND", capsys.readouterr().out)


class Page(html.parser.HTMLParser):
    """The tags of a page, which have to be closed in order, and what they refer to."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.references = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_of_a_run_stands_alone(folder, training):
    pytest.importorskip("matplotlib")
    lines, _ = training(*FOLDER, "--num_steps=3", "--report")
    text = Path("output/run/report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") >= 3 + 9  # pictures, and every image of the small split
    assert {reference.partition(",")[0] for reference in page.references} <= {
        "data:image/png;base64",
        "data:image/svg+xml;base64",
        "data:image/jpeg;base64",
    }
    assert "http" not in text.replace("http-equiv", "")
    assert "script" not in page.tags
    assert f"{lines[-1]['eval/accuracy']:.2%}" in text
    for name in COLOURS:
        assert f"<td>{name}</td>" in text


def test_an_epoch_of_the_vendor_s_line_is_one_of_the_data(folder, training):
    _, out = training(*FOLDER, "--num_steps=5", "--tcap_log")
    assert re.findall(r"Epoch: (\d+) Iteration: (\d+)", out) == [
        ("0", "0"), ("0", "1"), ("1", "2"), ("1", "3"), ("2", "4")
    ]  # fmt: skip


def test_a_grey_model_says_what_it_needs_where_the_images_have_three_channels(training, capsys):
    config = vitfn.get_config("ViT-Nano_8", image_size=32, num_classes=10, channels=1)
    vitfn.save_npz("grey.npz", vitfn.init(config), config, [str(i) for i in range(10)])
    assert evaluate.main(["evaluate", "grey.npz", "--dataset=digits", "--compile=off", "--device=cpu"]) == 2
    assert "expected the model's 1" in capsys.readouterr().err
    lines, _ = training(*DIGITS, "--pretrained_dir=grey.npz")  # training adapts the first layer
    assert torch.tensor(losses(lines)).isfinite().all()
