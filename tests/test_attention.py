"""python -m vitfn.attention: pictures that can be read, one page that needs nothing else, and errors in one line."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image

import vitfn
from vitfn import attention, attention_figures, tree

pytest.importorskip("matplotlib", reason="requirements-dev.txt has it")

FAMILIES = {
    "token": SMALL,
    "gap": dataclasses.replace(SMALL, classifier="gap"),
    "map": dataclasses.replace(SMALL, classifier="map"),
    "fixed": dataclasses.replace(SMALL, classifier="gap", posemb="sincos2d"),
    "oblong": dataclasses.replace(SMALL, image_size=(16, 40)),
    "grey": dataclasses.replace(SMALL, channels=1),
    "hybrid": dataclasses.replace(SMALL, patch_size=1, resnet=vitfn.ResNetConfig((1, 1), 0.5)),
}
PICTURES = {"rollout", "relevance", "layers", "heads", "distances", "positions", "filters"}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "<b>nine</b>")


def saved(folder, config) -> str:
    generator = torch.Generator().manual_seed(0)
    params = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), vitfn.init(config))
    vitfn.save_npz(folder / "model.npz", params, config, NAMES)
    return str(folder / "model.npz")


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("photo") / "a photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_model_has_its_pictures_and_a_page(tmp_path, photo, family, capsys):
    out = tmp_path / "out"
    assert attention.main(["attention", saved(tmp_path, FAMILIES[family]), photo, f"--out={out}"]) == 0
    assert {path.name for path in out.iterdir()} == {"index.html", *(f"{name}.png" for name in PICTURES)}
    for name in PICTURES:
        with Image.open(out / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L")).astype(float)
        assert min(picture.size) > 150
        assert pixels.std() > 5, name  # something is drawn
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "<script" not in page
    assert "<b>nine" not in page
    assert "a photo.png" in page
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["page", str(out / "index.html")]
    assert len(printed) == 6


def test_the_probabilities_are_those_of_the_model(tmp_path, photo, capsys):
    model = saved(tmp_path, SMALL)
    assert attention.main(["attention", model, photo, f"--out={tmp_path / 'out'}"]) == 0
    pixels = torch.from_numpy(np.asarray(Image.open(photo)).copy()).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", align_corners=False)
    probabilities = vitfn.apply(vitfn.load(model), resized / 127.5 - 1, SMALL).softmax(-1)[0]
    best = int(probabilities.argmax())
    assert capsys.readouterr().out.splitlines()[1].split() == [f"{float(probabilities[best]):.2%}", NAMES[best]]


def test_another_class_s_relevance_is_another_picture(tmp_path, photo):
    model = saved(tmp_path, SMALL)
    for name in ("two", "three"):
        assert attention.main(["attention", model, photo, f"--out={tmp_path / name}", f"--class_name={name}"]) == 0
        assert f"What speaks for {name}" in (tmp_path / name / "index.html").read_text()
    two, three = ((tmp_path / name / "relevance.png").read_bytes() for name in ("two", "three"))
    assert two != three
    assert (tmp_path / "two/rollout.png").read_bytes() == (tmp_path / "three/rollout.png").read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--out=new", "--class_name=ten"), "--class_name: found 'ten', expected one of 10: zero, one, two"),
        (("--out=new", "--eval_crop=0.01"), "--eval_crop: found 0.01"),
        (("--out=new", "--labels=labels.txt"), "--labels=labels.txt: found 2 lines, expected the 10 classes"),
    ],
)
def test_what_is_wrong_shows_before_a_folder_is_made(tmp_path, photo, argv, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    assert attention.main(["attention", saved(tmp_path, SMALL), photo, *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_torn_image_is_named_and_leaves_nothing(tmp_path, photo, capsys):
    torn = tmp_path / "torn.png"
    torn.write_bytes(Path(photo).read_bytes()[:2000])
    assert attention.main(["attention", saved(tmp_path, SMALL), str(torn), f"--out={tmp_path / 'out'}"]) == 2
    assert "torn.png: found a damaged file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_of_a_model_without_a_head_all_but_a_class_s_relevance_is_drawn(tmp_path, photo, capsys):
    config = dataclasses.replace(SMALL, num_classes=0)
    vitfn.save_npz(tmp_path / "model.npz", vitfn.init(config), config)
    command = ["attention", str(tmp_path / "model.npz"), photo, f"--out={tmp_path / 'out'}"]
    assert attention.main(command) == 0
    assert "%" not in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"index.html", "rollout.png", "layers.png", "heads.png", "positions.png"} <= names
    assert "relevance.png" not in names
    assert attention.main([*command, "--class_name=cat"]) == 2
    assert "expected none: the model has no head" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(tmp_path, photo):
    model = saved(tmp_path, SMALL)
    code = (
        "import sys; sys.modules['matplotlib'] = None; from vitfn import attention; sys.exit(attention.main(sys.argv))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model, photo, f"--out={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "vitfn: pictures need matplotlib; install it with: pip install matplotlib"
    assert not (tmp_path / "out").exists()


def test_a_map_lights_the_patch_that_it_is_about():
    image, of_patches = torch.full((3, 32, 32), 255.0), torch.zeros(4, 4)
    of_patches[1, 2] = 3
    lit = attention_figures.overlay_figure(image, of_patches, "t").axes[1].images[0].get_array()
    assert np.unravel_index(lit[:, :, 0].argmax(), (32, 32)) in [(y, x) for y in range(8, 16) for x in range(16, 24)]
    assert lit[:8].max() < 0.6
    assert lit[24:].max() == 0


def test_tiles_lie_side_by_side():
    tiles = torch.arange(2 * 3 * 2 * 2).float().reshape(2, 3, 2, 2)
    mosaic = attention_figures._mosaic(tiles)
    assert mosaic.shape == (2 * 3 - 1, 3 * 3 - 1)
    assert torch.equal(mosaic[3:5, 6:8], tiles[1, 2])
    assert mosaic[2].isnan().all()
    assert mosaic[:, 5].isnan().all()
