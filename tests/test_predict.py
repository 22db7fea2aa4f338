"""python -m vitfn.predict: the model's own probabilities for each image that can be read; nothing else on stdout."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NANO, ROOT, SMALL
from PIL import Image

import vitfn
from vitfn import attention, labels, predict, train, tree, weights
from vitfn.errors import InputError

NAMES = (*(f"kind {i}" for i in range(9)), 'a, "quoted" name')


@pytest.fixture(scope="module")
def params() -> dict:
    generator = torch.Generator().manual_seed(0)
    return tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), vitfn.init(SMALL))


@pytest.fixture(scope="module")
def model(params, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "model.npz"
    vitfn.save_npz(path, params, SMALL, NAMES)
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of many sizes and formats, at two depths; one is torn, one is a text, and one is hidden."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deeper/still").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "b.bmp", "deeper/c.png", "deeper/still/d, e.png", ".hidden.png", "torn.png"]):
        pixels = generator.integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "torn.png").write_bytes((folder / "torn.png").read_bytes()[:900])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not meant to be one")
    return folder


GOOD = ("a.png", "b.bmp", "deeper/c.png", "deeper/still/d, e.png")


def probabilities(params: dict, path: Path) -> torch.Tensor:
    """Of one image, by other functions than the command's."""
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, (32, 32), mode="bilinear", align_corners=False)
    return vitfn.apply(params, resized / 127.5 - 1, SMALL).softmax(-1)[0]


def run(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vitfn.predict", *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        **options,
    )


def test_each_image_that_can_be_read_gets_the_model_s_probabilities(model, photos, params):
    done = run(model, str(photos), "--format=jsonl", "--top=10", "--num_workers=2")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == [str(photos / name) for name in GOOD]
    for row in rows:
        wanted = probabilities(params, Path(row["image"]))
        assert [guess["class"] for guess in row["classes"]] == [NAMES[guess["label"]] for guess in row["classes"]]
        assert sorted(guess["label"] for guess in row["classes"]) == list(range(10))
        found = [guess["probability"] for guess in row["classes"]]
        assert found == sorted(found, reverse=True)
        for guess in row["classes"]:
            assert guess["probability"] == pytest.approx(float(wanted[guess["label"]]), abs=2e-6)
    assert done.returncode == 1  # two could not be read
    assert "torn.png: found a damaged file" in done.stderr
    assert "text.jpg: found none of JPEG" in done.stderr
    assert "left out 1 files that are no images by their names, such as" in done.stderr
    assert "Traceback" not in done.stderr


def predicted(capsys, *argv: str) -> str:
    assert predict.main(["predict", *argv]) == 0
    return capsys.readouterr().out


def test_csv_is_read_back(model, photos, params, capsys):
    text = predicted(capsys, model, str(photos / "deeper"), "--format=csv", "--top=2")
    header, *rows = csv.reader(text.splitlines())
    assert header == ["image", "rank", "class", "label", "probability"]
    assert [row[0] for row in rows] == [str(photos / name) for name in GOOD[2:] for _ in range(2)]
    assert [row[1] for row in rows] == ["1", "2"] * 2
    for path, _, name, label, probability in rows:
        assert name == NAMES[int(label)]
        assert float(probability) == pytest.approx(float(probabilities(params, Path(path))[int(label)]), abs=2e-6)


def test_the_table_has_a_line_for_each_class(model, photos, params, capsys):
    paths = [str(photos / name) for name in GOOD[:2]]
    lines = predicted(capsys, model, *paths, "--top=3").splitlines()
    assert len(lines) == 6
    for path, block in zip(paths, (lines[:3], lines[3:]), strict=True):
        best = probabilities(params, Path(path)).topk(3)
        assert block[0].startswith(path)
        assert [line[len(path) :].split(maxsplit=1) for line in block] == [
            [f"{value:.2%}", NAMES[label]] for value, label in zip(*map(torch.Tensor.tolist, best), strict=True)
        ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 64])
def test_the_size_of_a_batch_changes_nothing(model, photos, params, batch_size):
    paths = tuple(str(photos / name) for name in (*GOOD[:2], "text.jpg", *GOOD[2:]))
    step = vitfn.make_predict_step(SMALL, compile="off")
    fit = predict.partial(predict.recipe.resize, size=SMALL.image_hw)
    found = {}
    for places, each in predict.predict(step, params, paths, SMALL, batch_size, fit=fit):
        assert len(places) == len(each) <= batch_size
        found |= dict(zip(places, each, strict=True))
    assert list(found) == [0, 1, 3, 4]
    for place, name in zip(found, GOOD, strict=True):
        torch.testing.assert_close(found[place], probabilities(params, photos / name), rtol=1e-5, atol=1e-6)


def test_files_folders_and_patterns_are_found_in_their_order(photos):
    given = [str(photos / "b.bmp"), str(photos / "deeper"), str(photos / "*.png"), str(photos / "**/*.png")]
    found = [str(Path(path).relative_to(photos)) for path in predict.image_files(given)]
    assert found == [
        "b.bmp",
        *("deeper/c.png", "deeper/still/d, e.png"),
        *("a.png", "torn.png"),
        *("a.png", "deeper/c.png", "deeper/still/d, e.png", "torn.png"),
    ]


def test_what_names_no_image_is_refused(photos, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: found no such file or folder, expected an image, a folder"):
        predict.image_files([str(photos / "a.png"), str(photos / "nowhere")])
    with pytest.raises(InputError, match=r"found no images in this folder, expected .jpg"):
        predict.image_files([str(tmp_path)])


def test_names_come_from_a_file_the_model_or_imagenet(params, tmp_path):
    def described(count: int, names: tuple[str, ...] | None = None) -> weights.Description:
        return weights.Description(dataclasses.replace(SMALL, num_classes=count), names, True)

    assert labels.class_names(described(10, NAMES), "m") == NAMES
    imagenet = labels.class_names(described(1000), "m")
    assert len(set(imagenet)) == 1000
    assert [imagenet[i] for i in (0, 1, 207, 281, 999)] == [
        *("tench", "goldfish", "golden retriever", "tabby", "toilet tissue")
    ]
    assert labels.class_names(described(3), "m") == ("class 0", "class 1", "class 2")
    file = tmp_path / "names.txt"
    file.write_text("Fuß\ndrei Wörter hier\n", encoding="utf-8")
    assert labels.class_names(described(2, ("x", "y")), "m", str(file)) == ("Fuß", "drei Wörter hier")
    with pytest.raises(InputError, match=r"names.txt: found 2 lines, expected the 10 classes of m"):
        labels.class_names(described(10), "m", str(file))
    file.write_bytes(b"\xff\xfe\n\n")
    with pytest.raises(InputError, match="found bytes that are no UTF-8"):
        labels.class_names(described(2), "m", str(file))


def test_a_sigmoid_model_s_classes_do_not_exclude_each_other(params):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    step = vitfn.make_predict_step(SMALL, compile="off", multi_label=True)
    torch.testing.assert_close(step(params, (images,)), vitfn.apply(params, images, SMALL).sigmoid())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["block", "step"])
def test_compiled_it_says_the_same(params, form):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    step = vitfn.make_predict_step(SMALL, compile=form, compile_fallback=False)
    torch.testing.assert_close(step(params, (images,)), vitfn.apply(params, images, SMALL).softmax(-1))
    assert step.form == form


def test_who_has_seen_enough_may_leave(model, photos):
    """As `head -1` does."""
    many = [str(photos / "a.png")] * 400
    with subprocess.Popen(
        [sys.executable, "-m", "vitfn.predict", model, *many, "--format=csv", "--batch_size=4", "--num_workers=0"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "image,rank,class,label,probability\n"
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 141, said
    assert "Traceback" not in said


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names there are Unicode")
def test_a_name_that_is_no_text_comes_out_as_it_is(model, photos, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write((photos / "a.png").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "vitfn.predict", model, name, "--format=csv", "--top=1"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith(name + b",1,")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["MODEL"], "found MODEL, expected the arguments MODEL IMAGES..."),
        (["MODEL", "nowhere.png"], "nowhere.png: found no such file or folder"),
        (["nowhere.npz", "PHOTO"], "nowhere.npz: expected a file of weights, found: No such file"),
        (["MODEL", "PHOTO", "--top=0"], "--top"),
        (["MODEL", "PHOTO", "--format=xml"], "--format"),
        (["HEADLESS", "PHOTO"], "found a model without a head"),
    ],
)
def test_bad_input_is_one_line(model, photos, tmp_path, argv, message, capsys):
    config = dataclasses.replace(SMALL, num_classes=0)
    vitfn.save_npz(tmp_path / "headless.npz", vitfn.init(config), config)
    real = {"MODEL": model, "PHOTO": str(photos / "a.png"), "HEADLESS": str(tmp_path / "headless.npz")}
    assert predict.main(["predict", *(real.get(word, word) for word in argv)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message.replace("MODEL", model, 1) in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.slow
def test_a_run_predicts_with_its_own_names_crop_and_loss(tmp_path, monkeypatch, photos, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["train", *NANO, "--name=run", "--num_steps=2", "--warmup_steps=1", "--eval_crop=0.8",
                       "--compile=off", "--noreport", "--loss=sigmoid"]) == 0  # fmt: skip
    capsys.readouterr()
    row = json.loads(predicted(capsys, "output/run", str(photos / "a.png"), "--format=jsonl", "--top=10"))
    assert sorted(guess["class"] for guess in row["classes"]) == [str(i) for i in range(10)]
    params = vitfn.load("output/run/model.npz")
    config = weights.describe("output/run/model.npz").config
    pixels = torch.from_numpy(np.asarray(Image.open(photos / "a.png")).copy()).permute(2, 0, 1)[None]
    from vitfn.data.crops import resize_and_crop

    images = resize_and_crop(pixels, config.image_hw, 0.8, "bilinear") / 127.5 - 1
    wanted = vitfn.apply(params, images, config).sigmoid()[0]
    for guess in row["classes"]:
        assert guess["probability"] == pytest.approx(float(wanted[guess["label"]]), abs=1e-5)
    assert attention.main(["attention", "output/run", str(photos / "a.png")]) == 0
    likeliest = row["classes"][0]
    assert f"{likeliest['probability']:>12.2%} {likeliest['class']}\n" in capsys.readouterr().out
