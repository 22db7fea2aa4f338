"""Evaluation counts every image exactly once, by the names of the classes, and says so in numbers, tables and files."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, without_bar
from PIL import Image

import vitfn
from vitfn import convert, evaluate, metrics, train, weights
from vitfn.data import Files, Split, cifar
from vitfn.errors import InputError

NAMES = ("bird", "cat", "dog")
MODEL = vitfn.get_config("ViT-Nano_8", image_size=32, num_classes=3)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Noise of one colour each."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(23, 3, 20, 20, generator=generator) * torch.rand(23, 3, 1, 1, generator=generator)
    return (255 * noise).round().to(torch.uint8)


def logits_of(params: dict, images: torch.Tensor) -> torch.Tensor:
    """Of each image by itself, resized by torch."""
    resized = F.interpolate(images.float(), (32, 32), mode="bilinear", align_corners=False, antialias=False)
    return torch.cat([vitfn.apply(params, image[None], SMALL) for image in (resized - 127.5) / 127.5])


@pytest.fixture(scope="module")
def params(images) -> dict:
    """A random head, centred so that the answers vary."""
    params = vitfn.init(SMALL, 0)
    params["head"]["kernel"].normal_(generator=torch.Generator().manual_seed(1))
    params["head"]["bias"] -= logits_of(params, images).mean(0)
    return params


@pytest.fixture(scope="module")
def logits(params, images) -> torch.Tensor:
    return logits_of(params, images)


@pytest.fixture(scope="module")
def split(images, logits) -> Split:
    """The model is right about each third image, the last one among them."""
    answers = logits.argmax(-1)
    assert len(answers.unique()) > 2
    wrong = torch.arange(23) % 3 != 1
    return Split(images, (answers + wrong) % 10)


def step():
    return vitfn.make_eval_step(SMALL, compile="off")


# --- the function


@pytest.mark.parametrize("batch_size", [1, 8, 23, 64])
def test_accuracy_is_exact_to_the_image(params, split, batch_size):
    predictions, places = evaluate.evaluate(step(), params, split, SMALL, batch_size)
    found = metrics.measures(predictions)
    assert (found["correct"], found["count"]) == (8, 23)
    assert found["accuracy"] == 8 / 23
    assert places.tolist() == list(range(23))


@pytest.mark.parametrize("batch_size", [1, 8, 23, 64])
def test_what_is_said_of_each_image_is_in_the_split_s_order(params, split, logits, batch_size):
    predictions, _ = evaluate.evaluate(step(), params, split, SMALL, batch_size)
    assert predictions.labels.equal(split.labels)
    assert predictions.predicted.equal(logits.argmax(-1))
    torch.testing.assert_close(predictions.confidence, logits.softmax(-1).amax(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        predictions.loss, F.cross_entropy(logits, split.labels, reduction="none"), rtol=1e-4, atol=1e-5
    )
    ranks = (logits > logits.gather(1, split.labels[:, None])).sum(-1)
    assert predictions.in_top5.equal(ranks < 5)


def test_padding_does_not_count_for_class_0(split):
    """An image of padding is empty, and a model that answers class 0 to everything is not right about it."""
    params = vitfn.init(SMALL, 0)
    params["head"]["bias"][0] = 1
    predictions, _ = evaluate.evaluate(step(), params, split, SMALL, 16)
    assert int(predictions.right.sum()) == int((split.labels == 0).sum())


def test_every_batch_has_one_shape(params, split):
    """So that a compiled step is compiled once."""
    made, shapes = step(), []

    def spy(params, batch):
        shapes.append(tuple(part.shape for part in batch))
        return made(params, batch)

    evaluate.evaluate(spy, params, split, SMALL, 8)
    assert shapes == [((8, 3, 32, 32), (8,))] * 3


@pytest.fixture
def files(images, split, tmp_path) -> Files:
    """The split as PNG files, of which numbers 0, 5 and 22 are torn."""
    paths = []
    for i, image in enumerate(images):
        paths.append(str(tmp_path / f"{i:02}.png"))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    for i in (0, 5, 22):
        Path(paths[i]).write_bytes(Path(paths[i]).read_bytes()[:200])
    return Files(tuple(paths), split.labels, 3)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_broken_images_that_are_left_out_are_not_counted(params, split, files, batch_size, caplog):
    whole = torch.tensor([i for i in range(23) if i not in (0, 5, 22)])
    predictions, places = evaluate.evaluate(step(), params, files, SMALL, batch_size, on_bad="skip")
    expected, _ = evaluate.evaluate(step(), params, Split(*(part[whole] for part in split)), SMALL, batch_size)
    assert places.equal(whole)
    assert predictions.labels.equal(expected.labels)
    assert predictions.predicted.equal(expected.predicted)
    torch.testing.assert_close(predictions.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert sum("it is left out" in record.message for record in caplog.records) == 3


def test_nothing_but_broken_images_is_refused(params, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    files = Files((str(tmp_path / "a.png"),), torch.tensor([0]), 3)
    with pytest.raises(InputError, match="no image that can be read among 1"):
        evaluate.evaluate(step(), params, files, SMALL, 4, on_bad="skip")


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_an_image_with_several_labels_is_right_if_all_of_its_classes_are(params, images, logits, batch_size):
    labels = (logits > 0).float()
    labels[::2, 3] = 1 - labels[::2, 3]
    loss = vitfn.losses.sigmoid
    step = vitfn.make_eval_step(SMALL, compile="off", loss=loss)
    predictions, _ = evaluate.evaluate(step, params, Split(images, labels), SMALL, batch_size)
    found = metrics.measures(predictions)
    assert (found["correct"], found["count"]) == (11, 23)
    want = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
    assert found["loss"] == pytest.approx(float(want), rel=1e-5)
    assert "top5" not in found


def test_all_real_test_images_are_counted_whatever_the_batches_are(cifar_dir):
    split = cifar.load("cifar10", str(cifar_dir)).test
    params = vitfn.init(SMALL, 0)
    params["head"]["kernel"].normal_(generator=torch.Generator().manual_seed(1))
    found = {}
    for batch_size in (100, 846):
        predictions, _ = evaluate.evaluate(step(), params, split, SMALL, batch_size)
        found[batch_size] = predictions
        assert metrics.measures(predictions)["count"] == 846
        assert predictions.labels.equal(split.labels)
    with torch.no_grad():
        answers = vitfn.apply(params, (split.images.float() - 127.5) / 127.5, SMALL).argmax(-1)
    assert found[100].predicted.equal(found[846].predicted)
    assert found[100].predicted.equal(answers)
    assert metrics.measures(found[100])["correct"] == int((answers == split.labels).sum())


# --- the command


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A folder val of 5 bird, 5 cat and 5 dog images of 40x50 pixels, and a model of these classes: model.npz."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 1), ("val", 5)):
        for label, name in enumerate(NAMES):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                small = rng.integers(0, 256, (5, 4, 3)).astype(np.uint8)
                small[..., label] = 255 - small[..., label] // 4
                Image.fromarray(small).resize((40, 50), Image.Resampling.BICUBIC).save(
                    tmp_path / "data" / part / name / f"{i}.png"
                )
    params = vitfn.init(MODEL, 0)
    params["head"]["kernel"].normal_(generator=torch.Generator().manual_seed(2))
    pictures = torch.stack([torch.from_numpy(array) for array in fitted(tmp_path, 32, None)])
    with torch.no_grad():
        params["head"]["bias"] -= vitfn.apply(params, pictures, MODEL).mean(0)
    vitfn.save_npz("model.npz", params, MODEL, NAMES)
    return tmp_path


def paths(world: Path) -> list[Path]:
    return sorted((world / "data" / "val").glob("*/*.png"))


def fitted(world: Path, size: int, crop: int | None, filter: Image.Resampling = Image.Resampling.BICUBIC) -> list:
    """The validation images by PIL, as (3, size, size) float32 in [-1, 1]: resized, or `crop` on the shorter side."""
    found = []
    for path in paths(world):
        image = Image.open(path)
        if crop:
            image = image.resize((crop, crop * image.height // image.width), filter)
            left, top = round((image.width - size) / 2), round((image.height - size) / 2)
            pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32).transpose(2, 0, 1)
        else:
            planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
            pixels = F.interpolate(planes, (size, size), mode="bilinear", antialias=False)[0].numpy()
        found.append((pixels - 127.5) / 127.5)
    return found


def answers(world: Path, *fit) -> torch.Tensor:
    pictures = torch.stack([torch.from_numpy(array) for array in fitted(world, 32, *fit)])
    with torch.no_grad():
        return vitfn.apply(vitfn.load_npz("model.npz"), pictures, MODEL)


TRUE = torch.arange(3).repeat_interleave(5)
FOLDER = ("--dataset=folder", "--data_dir=data", "--num_workers=0", "--compile=off", "--device=cpu")


@pytest.fixture
def command(capsys):
    """A function: runs the command, returns its exit code, what it printed by name, and what it said on stderr."""

    def run(*arguments: str) -> tuple[int, dict[str, str], str]:
        code = evaluate.main(["evaluate", *map(str, arguments)])
        out, err = capsys.readouterr()
        rows = (line.split("  ", 1) for line in out.partition("\n\n")[0].splitlines())
        return code, {name: value.strip() for name, value in rows}, without_bar(err)

    return run


def shown(logits: torch.Tensor, labels: torch.Tensor = TRUE) -> str:
    right = int((logits.argmax(-1) == labels).sum())
    return f"{right / len(labels):.2%} ({right} of {len(labels)})"


def test_a_file_is_evaluated_and_leaves_nothing_behind(world, command):
    code, rows, _ = command("model.npz", *FOLDER)
    logits = answers(world, None)
    assert len(logits.argmax(-1).unique()) == 3
    assert code == 0
    assert rows["accuracy"] == shown(logits)
    assert rows["loss"] == f"{float(F.cross_entropy(logits, TRUE)):.4f}"
    assert rows.keys() == {"model", "accuracy", "loss", "calibration error"}  # the top 5 of 3 classes says nothing
    assert {path.name for path in world.iterdir()} == {"data", "model.npz"}


def test_the_other_images_are_evaluated_where_they_are_asked_for(world, command):
    """Without a split of its own, a folder of classes is evaluated whole by --split=all."""
    bare = "--data_dir=data/val"
    counts = {
        split: command("model.npz", *FOLDER, bare, f"--split={split}")[1]["accuracy"] for split in ("all", "train")
    }
    right, total = re.fullmatch(r".* \((\d+) of (\d+)\)", counts["all"]).groups()
    assert (int(right), int(total)) == (int((answers(world, None).argmax(-1) == TRUE).sum()), len(TRUE))
    assert int(re.fullmatch(r".* of (\d+)\)", counts["train"])[1]) < len(TRUE)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_centre_crop_is_pil_s(world, command, interpolation):
    filter = Image.Resampling[interpolation.upper()]
    logits = answers(world, math.floor(32 / 0.875), filter)
    code, rows, _ = command("model.npz", *FOLDER, "--eval_crop=0.875", f"--eval_interpolation={interpolation}")
    assert code == 0
    assert rows["accuracy"] == shown(logits)
    assert float(rows["loss"]) == pytest.approx(float(F.cross_entropy(logits, TRUE)), rel=5e-3)  # PIL rounds pixels
    assert rows["loss"] != f"{float(F.cross_entropy(answers(world, None), TRUE)):.4f}"


def test_a_timm_safetensors_file_gives_the_same_numbers(world, command, capsys):
    assert convert.main(["convert", "model.npz", "model.safetensors", "--to=timm"]) == 0
    capsys.readouterr()
    theirs = command("model.safetensors", *FOLDER)[1]
    ours = command("model.npz", *FOLDER)[1]
    assert theirs.pop("model") == "model.safetensors"
    assert ours.pop("model") == "model.npz"
    assert theirs == ours


def test_files_are_written_and_agree(world, command):
    pytest.importorskip("matplotlib")
    _, rows, _ = command("model.npz", *FOLDER, "--out=out/deep", "--eval_crop=1", "--eval_batch_size=4")
    out = Path("out/deep")
    assert rows["files"] == "out/deep"
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json",
        "per_class.csv",
        "confusion.csv",
        "confusion.png",
        "calibration.png",
    }
    found = json.loads((out / "evaluation.json").read_text())
    assert (found["model"], found["dataset"], found["data_dir"], found["eval_crop"]) == (
        "model.npz",
        "folder",
        "data",
        1,
    )
    assert f"{found['accuracy']:.2%} ({found['correct']:.0f} of {found['count']:.0f})" == rows["accuracy"]
    header, *confusion = csv.reader((out / "confusion.csv").read_text().splitlines())
    assert tuple(header[1:]) == tuple(row[0] for row in confusion) == NAMES
    counts = np.array([row[1:] for row in confusion], int)
    assert counts.sum(1).tolist() == [5, 5, 5]
    assert counts.trace() == found["correct"]
    per_class = list(csv.DictReader((out / "per_class.csv").read_text().splitlines()))
    assert [(row["name"], row["images"], row["right"]) for row in per_class] == [
        (name, "5", str(right)) for name, right in zip(NAMES, counts.diagonal(), strict=True)
    ]
    for name in ("confusion.png", "calibration.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100


def test_labels_follow_the_names_of_the_classes(world, command):
    """The same model with its classes in another order is as good, and one of more classes too."""
    expected = command("model.npz", *FOLDER)[1]
    params = vitfn.load_npz("model.npz")
    order = [2, 0, 1]
    moved = params | {"head": {"kernel": params["head"]["kernel"][:, order], "bias": params["head"]["bias"][order]}}
    vitfn.save_npz("moved.npz", moved, MODEL, [NAMES[i] for i in order])
    rows = command("moved.npz", *FOLDER)[1]
    assert (rows["accuracy"], rows["loss"]) == (expected["accuracy"], expected["loss"])
    more = vitfn.get_config("ViT-Nano_8", image_size=32, num_classes=4)
    head = {"kernel": F.pad(moved["head"]["kernel"], (1, 0)), "bias": F.pad(moved["head"]["bias"], (1, 0), value=-1e9)}
    vitfn.save_npz("more.npz", moved | {"head": head}, more, ["ant", *(NAMES[i] for i in order)])
    rows = command("more.npz", *FOLDER, "--out=out")[1]
    assert (rows["accuracy"], rows["loss"]) == (expected["accuracy"], expected["loss"])
    assert Path("out/confusion.csv").read_text().splitlines()[1] == "ant,0,0,0,0"


def test_a_class_that_the_model_lacks_is_refused_by_name(world, command):
    other = vitfn.get_config("ViT-Nano_8", image_size=32, num_classes=200)
    vitfn.save_npz("other.npz", vitfn.init(other), other, ["bird", "cat", *(f"class {i}" for i in range(198))])
    code, _, err = command("other.npz", *FOLDER)
    assert (code, err.count("\n")) == (2, 1)
    assert "other.npz: found the class 'dog' in the dataset" in err
    assert "bird, cat, class 0" in err
    assert len(err) < 500


def test_another_number_of_classes_without_names_is_refused(world, command):
    other = vitfn.get_config("ViT-Nano_8", image_size=32, num_classes=7)
    vitfn.save_npz("other.npz", vitfn.init(other), other)
    code, _, err = command("other.npz", *FOLDER)
    assert (code, err) == (2, "vitfn: other.npz: found 3 classes in the dataset, expected the model's 7\n")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["absent.npz"], ["absent.npz", "No such file"]),
        (["data"], ["data: found a folder without weights"]),
        ([], ["found no arguments", "MODEL"]),
        (["model.npz", "more.npz"], ["more.npz", "MODEL"]),
        (["model.npz", "--eval_crop=nan"], ["--eval_crop=nan", "finite"]),
        (["model.npz", "--eval_crop=0.01"], ["--eval_crop", "0.01", "0.1 to 1"]),
        (["model.npz", "--eval_crop=87.5"], ["--eval_crop=87.5", "[0, 1]"]),
        (["model.npz", "--eval_interpolation=bicubic"], ["--eval_interpolation=bicubic", "--eval_crop"]),
        (["model.npz", "--data_dir=nowhere"], ["nowhere", "no such folder"]),
        (["model.npz", "--dataset=digits"], ["the class '0'", "bird, cat, dog"]),
        (["model.npz", "--channels=1"], ["channels"]),
        (["grey.npz", "--dataset=digits"], ["grey.npz", "3 channels", "expected the model's 1"]),
    ],
)
def test_what_is_wrong_is_one_line(world, command, arguments, parts):
    grey = vitfn.get_config("ViT-Nano_8", image_size=32, num_classes=10, channels=1)
    vitfn.save_npz("grey.npz", vitfn.init(grey), grey)
    before = {path.name for path in world.iterdir()}
    code, rows, err = command(*FOLDER, *arguments)
    assert (code, rows, err.count("\n")) == (2, {}, 1)
    for part in parts:
        assert part in err
    assert {path.name for path in world.iterdir()} == before


def test_a_broken_image_ends_it_or_is_left_out(world, command, caplog):
    torn = paths(world)[7]
    torn.write_bytes(torn.read_bytes()[:100])
    code, _, err = command("model.npz", *FOLDER)
    assert code == 2
    assert "data/val/cat/2.png" in err
    code, rows, _ = command("model.npz", *FOLDER, "--bad_images=skip")
    torn.unlink()
    assert (code, rows["accuracy"]) == (0, command("model.npz", *FOLDER)[1]["accuracy"])
    assert rows["accuracy"].endswith(" of 14)")


def test_numbers_that_are_not_finite_are_null(world, command):
    params = vitfn.load_npz("model.npz")
    params["head"]["bias"][:] = math.nan
    vitfn.save_npz("nan.npz", params, MODEL, NAMES)

    def refuse(constant):
        raise AssertionError(constant)

    assert command("nan.npz", *FOLDER, "--out=out")[0] == 0
    assert json.loads(Path("out/evaluation.json").read_text(), parse_constant=refuse)["loss"] is None


def test_a_run_is_evaluated_as_it_was_trained_and_gives_what_train_printed(world, command, capsys):
    """Of --ema the average is what is evaluated, saved, and evaluated again."""
    argv = ["--model_type=ViT-Nano_8", "--img_size=32", "--pretrained_dir=", "--train_batch_size=3", "--num_steps=6"]
    argv += ["--warmup_steps=0", "--eval_batch_size=4", "--name=run", "--learning_rate=0.1", "--ema=0.9", "--noreport"]
    assert train.main(["train", *FOLDER, *argv, "--eval_crop=0.9", "--eval_interpolation=bicubic"]) == 0
    printed = capsys.readouterr().out
    code, rows, err = command("output/run", "--device=cpu")
    assert code == 0, err
    assert f"test accuracy  {rows['accuracy']}\n" in printed
    assert re.search(rf"test loss +{rows['loss']}\n", printed)
    last = json.loads(Path("output/run/metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads(Path("output/run/evaluation/evaluation.json").read_text())
    for name in ("loss", "accuracy", "correct", "count", "calibration_error"):
        assert found[name] == pytest.approx(last[f"eval/{name}"], rel=1e-6), name
    assert (found["eval_crop"], found["eval_interpolation"]) == (0.9, "bicubic")
    whole = command("output/run", "--eval_crop=0", "--eval_interpolation=bilinear", "--out=whole")[1]
    assert whole["files"] == "whole"
    assert whole["loss"] != rows["loss"]


def test_the_best_weights_stand_in_for_those_of_a_run_that_did_not_end(world, command):
    params = weights.load("model.npz")
    Path("run").mkdir()
    vitfn.save_npz("run/best.npz", params, MODEL, NAMES)
    config = {
        "dataset": "folder",
        "data_dir": "data",
        "compile": "off",
        "device": "cpu",
        "num_workers": 0,
        "loss": None,
    }
    Path("run/config.json").write_text(json.dumps(config))
    code, rows, _ = command("run")
    assert (code, rows["model"]) == (0, "run/best.npz")
    assert rows["accuracy"] == command("model.npz", *FOLDER)[1]["accuracy"]
    Path("run/config.json").write_text("{")
    code, _, err = command("run")
    assert code == 2
    assert "run/config.json: expected a run's config" in err
