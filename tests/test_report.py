"""The pictures draw for any run, and the page is whole, well-formed, self-contained and safe."""

import base64
import io
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from test_metrics import several, some

from vitfn import figures, report
from vitfn.errors import InputError
from vitfn.metrics import confusion
from vitfn.report import Sample

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

NAMES = [
    "<script>alert(1)</script>",
    '" onerror="alert(1)',
    "$\\frac$",
    "猫",
    "caf\udce9",
    "a\nb\x1b[31m",
    "&amp;",
    "x" * 99,
]
CONFIG = {
    "name": "<b>run</b>",
    "dataset": "digits",
    "changed": {"data_dir": "<i>here</i>", "num_steps": 2},
    "model": {"name": "ViT-Ti_16", "parameters": 1234567},
    "resolved": {"device": "cpu", "compile": {"train": {"form": "block"}}},
    "versions": {"torch": "2.13.0"},
}
ROWS = [
    {"step": 1, "train/loss": 2.5, "train/grad_norm": 1.0, "train/learning_rate": 0.1},
    {"step": 2, "train/loss": None, "train/grad_norm": None, "train/learning_rate": 0.2},
    {"step": 3, "train/loss": 1.25, "train/grad_norm": 0.5, "train/learning_rate": 0.1},
    {"step": 3, "eval/loss": 1.5, "eval/accuracy": 0.625, "eval/correct": 5.0, "eval/count": 8.0},
]


class Page(HTMLParser):
    """Tags that are opened and closed in order, their attributes, and the text outside of <style>."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if "style" in self.open else data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def sources(self) -> list[str]:
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]


def samples(names: list[str]) -> list[Sample]:
    return [
        Sample(torch.full((3, 4, 6), 10 * i, dtype=torch.uint8), name, names[0], 0.5 + i / 100)
        for i, name in enumerate(names)
    ]


def write(path, **changes) -> Page:
    """The page of a run of which everything is known, with `changes`."""
    arguments = {
        "command": "train --name='<b>run</b>' \\\n  --x=1",
        "config": CONFIG,
        "rows": ROWS,
        "predictions": some(40, len(NAMES))[0],
        "class_names": NAMES,
        "samples": samples(NAMES),
    }
    report.write(path, **{**arguments, **changes})
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Page, str]:
    """A page with everything on it, and its text."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write(path), path.read_text(encoding="utf-8")


@pytest.fixture
def no_matplotlib(monkeypatch):
    """Pages without pictures are written fast."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def test_a_page_is_well_formed_and_complete(whole):
    page, _ = whole
    assert len(page.sources()) == 3 + len(NAMES)
    for text in ("1,234,567 parameters", "Flags not at their defaults", "compile/train/form", "calibration error"):
        assert text in page.text
    assert "pip install" not in page.text


def test_a_page_needs_nothing_else(whole):
    page, text = whole
    assert not re.search(r"https?://|url\(|@import", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for source in page.sources():
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True))).verify()


def test_names_are_text_and_nothing_else(whole):
    page, text = whole
    assert "<script" not in text
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "i" not in {tag for tag, _ in page.tags}
    for name in ("<script>alert(1)</script>", '" onerror="alert(1)', "$\\frac$", "猫", "caf?", "a?b?[31m", "&amp;"):
        assert name in page.text
    assert ["data_dir", "<i>here</i>"] in page.rows
    assert "train --name='<b>run</b>' \\\n  --x=1" in page.text


def test_the_headline_is_the_predictions(tmp_path, no_matplotlib):
    p, _ = some(40, 8)
    page = write(tmp_path / "report.html", predictions=p)
    assert f"accuracy{float(p.right.float().mean()):.2%}{int(p.right.sum())} of 40 images" in page.text
    assert f"test loss{float(p.loss.mean()):.4f}" in page.text
    assert "training loss1.2500" in page.text
    assert "steps3" in page.text


def test_without_predictions_the_headline_is_the_last_evaluation(tmp_path, no_matplotlib):
    page = write(tmp_path / "report.html", predictions=None, samples=[])
    assert "accuracy62.50%5 of 8 images" in page.text


def test_what_is_not_finite_is_said(tmp_path, no_matplotlib):
    p = some(40, 8)[0]._replace(loss=torch.full((40,), math.nan), confidence=torch.full((40,), math.nan))
    page = write(tmp_path / "report.html", predictions=p, rows=ROWS[:2])
    for name in ("test loss", "training loss", "calibration error"):
        assert f"{name}not finite" in page.text
    page = write(
        tmp_path / "report.html", predictions=None, rows=[{"step": 0, "eval/loss": None, "eval/accuracy": None}]
    )
    assert "test lossnot finite" in page.text


def test_mistakes_come_first_and_are_marked_in_words(tmp_path):
    page = write(tmp_path / "report.html")
    marks = re.findall(r"(✗ wrong|✓ right) ([\d.]+)%", page.text)
    assert [mark for mark, _ in marks] == ["✗ wrong"] * 7 + ["✓ right"]
    assert [confidence for _, confidence in marks[:7]] == [f"{50 + i:.2f}" for i in range(7, 0, -1)]


def test_classes_are_listed_from_the_worst(tmp_path, no_matplotlib):
    page = write(tmp_path / "report.html", class_names=[*NAMES, "absent"])
    start = page.rows.index(["class", "images", "right", "recall", "precision", "F1"])
    *rows, last = page.rows[start + 1 :][: len(NAMES) + 1]
    assert last == ["absent", "0", "0", "—", "—", "—"]
    recalls = [int(right) / int(images) for _, images, right, *_ in rows]
    assert recalls == sorted(recalls)
    assert [recall for _, _, _, recall, *_ in rows] == [f"{recall:.2%}" for recall in recalls]


def test_several_labels_an_image_have_a_page_too(tmp_path, no_matplotlib):
    page = write(tmp_path / "report.html", predictions=several(40, 8), rows=[], samples=[])
    assert "mean average precision" in page.text
    assert page.sources() == []


def test_an_empty_run_has_a_page(tmp_path):
    page = write(tmp_path / "report.html", config={}, rows=[], predictions=None, samples=[], class_names=[])
    assert page.sources() == []
    assert "Command" in page.text


def test_without_matplotlib_the_page_says_what_to_install(tmp_path, no_matplotlib):
    page = write(tmp_path / "report.html")
    assert page.text.count("pip install matplotlib") == 1
    assert len(page.sources()) == len(NAMES)
    with pytest.raises(InputError, match="pip install matplotlib"):
        figures.curves_figure(ROWS)


def test_without_pillow_the_page_says_what_to_install(tmp_path, no_matplotlib, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    page = write(tmp_path / "report.html")
    assert page.text.count("pip install pillow") == 1
    assert page.sources() == []


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch, no_matplotlib):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.html", "old")]


def test_the_same_run_has_the_same_page(tmp_path, whole):
    write(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == whole[1]


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 8, 8), (128, 128)), ((3, 300, 600), (64, 128, 3)), ((4, 1, 500), (1, 128, 3))]
)
def test_a_thumbnail_keeps_the_shape_of_its_image(shape, size):
    assert pixels(figures.thumbnail_uri(torch.zeros(shape, dtype=torch.uint8))).shape == size


def test_a_thumbnail_has_the_colours_of_its_image():
    image = torch.tensor([[[255, 0]], [[0, 255]], [[10, 20]]], dtype=torch.uint8)  # two pixels
    found = pixels(figures.thumbnail_uri(image))
    assert (found[:, :64] == [255, 0, 10]).all()
    assert (found[:, 64:] == [0, 255, 20]).all()


@pytest.mark.parametrize("k", [1, 2, 10, 100])
def test_a_confusion_is_drawn_for_any_number_of_classes(k):
    p, _ = some(20 * k, k)
    figure = figures.confusion_figure(confusion(p, k), [f"class number {i}" for i in range(k)])
    assert figures.data_uri(figure).startswith("data:image/png;base64,")
    axes = figure.axes[0]
    counts = {tuple(map(int, text.get_position()))[::-1]: int(text.get_text()) for text in axes.texts}
    assert len(axes.get_xticks()) <= 25
    if k <= 30:
        matrix = confusion(p, k)
        assert counts == {(i, j): int(matrix[i, j]) for i in range(k) for j in range(k) if matrix[i, j]}
    else:
        assert counts == {}


def test_labels_that_cannot_be_drawn_are_numbers():
    figure = figures.confusion_figure(torch.eye(len(NAMES), dtype=torch.int64), NAMES)
    figures.data_uri(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[2:5] == ["$\\frac$", "#3", "#4"]
    assert all(len(label) <= 16 for label in labels)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS[:1],
        ROWS[1:2],
        ROWS[3:],
        [{"step": i, "train/loss": math.nan, "train/grad_norm": 0.0} for i in range(3)],
        [{"step": i, "train/loss": 1 / (1 + i)} for i in range(30_000)],
    ],
    ids=["a run", "one step", "a lost step", "an evaluation", "all lost", "a long run"],
)
def test_curves_are_drawn_for_any_run(rows):
    assert figures.data_uri(figures.curves_figure(rows)).startswith("data:image/png;base64,")


def test_curves_are_the_rows():
    loss, accuracy, rate, norm = figures.curves_figure(ROWS).axes
    training, lost, test = loss.lines
    np.testing.assert_array_equal(training.get_ydata(), [2.5, math.nan, 1.25])
    np.testing.assert_array_equal(lost.get_xdata(), [2])
    np.testing.assert_array_equal(test.get_xydata(), [[3, 1.5]])
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), [62.5])
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), [0.1, 0.2, 0.1])
    assert norm.get_yscale() == "log"


def test_calibration_is_drawn():
    p, _ = some(500, 10)
    figure = figures.reliability_figure(p)
    figures.data_uri(figure)
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == 500
    figures.data_uri(figures.reliability_figure(p._replace(confidence=torch.full((500,), math.nan))))


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")])
def test_a_picture_is_saved_in_the_format_of_its_name(tmp_path, name, start):
    figures.save(figures.curves_figure(ROWS), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_format_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.xyz: expected a path of a picture"):
        figures.save(figures.curves_figure(ROWS), tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_no_global_state():
    assert "matplotlib.pyplot" not in sys.modules
