"""Lists of image files as CSV and JSON lines: what they say, and by which line they are refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfn.data import Dataset, Files, load
from vitfn.errors import InputError


def write(folder: Path, **lists: str | bytes) -> Path:
    """Files by their names, in which a '_' stands for the '.'."""
    for name, text in lists.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def rows(files, data: Dataset) -> list[tuple[str, str]]:
    assert isinstance(files, Files)
    return [(path, data.class_names[label]) for path, label in zip(files.paths, files.labels.tolist(), strict=True)]


def refusal(data_dir: Path) -> str:
    with pytest.raises(InputError) as caught:
        load("list", str(data_dir))
    return str(caught.value)


CSV = "image,label\na.jpg,dog\nsub/b.jpg,cat\n"
JSONL = '{"image": "a.jpg", "label": "dog"}\n{"image": "sub/b.jpg", "label": "cat"}\n'


@pytest.mark.parametrize("lists", [{"train_csv": CSV, "val_csv": CSV}, {"train_jsonl": JSONL, "test_jsonl": JSONL}])
def test_csv_and_json_lines_say_the_same(lists, tmp_path):
    data = load("list", str(write(tmp_path, **lists)), channels=4)
    assert data.class_names == ("cat", "dog")
    assert rows(data.train, data) == [(str(tmp_path / "a.jpg"), "dog"), (str(tmp_path / "sub" / "b.jpg"), "cat")]
    assert rows(data.test, data) == rows(data.train, data)
    assert (data.train.channels, data.train.labels.dtype) == (4, torch.int64)


def test_the_first_of_val_validation_and_test_is_used(tmp_path):
    write(tmp_path, train_csv=CSV, test_csv="image,label\nt.jpg,cat\n", validation_jsonl=JSONL)
    assert load("list", str(tmp_path)).test.size == 2


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + CSV.encode(),
        CSV.replace("\n", "\r\n").encode(),
        b"\n" + CSV.replace("\n", "\n\n").encode(),
        CSV.rstrip().encode(),
        b'"label","width","image"\ndog,3,a.jpg\n"cat",,sub/b.jpg\n',
    ],
    ids=["byte order mark", "CRLF", "blank lines", "no last line end", "other columns"],
)
def test_spellings_of_csv(text, tmp_path):
    data = load("list", str(write(tmp_path, train_csv=text, val_csv=CSV)))
    assert rows(data.train, data) == rows(data.test, data)


@pytest.mark.parametrize("text", ["\ufeff" + JSONL, JSONL.replace("\n", "\r\n"), "\n \n" + JSONL, JSONL.rstrip()])
def test_spellings_of_json_lines(text, tmp_path):
    data = load("list", str(write(tmp_path, train_jsonl=text, val_csv=CSV)))
    assert rows(data.train, data) == rows(data.test, data)


def test_names_hold_any_character(tmp_path):
    names = ['a "b", c.jpg', "ünï/çödé.jpg", "x\u2028y.jpg", "two\nlines.jpg", "a|b.jpg"]
    quoted = "".join('"{}","l{}"\n'.format(name.replace('"', '""'), i) for i, name in enumerate(names))
    lines = "".join(json.dumps({"image": n, "label": f"l{i}"}, ensure_ascii=False) + "\n" for i, n in enumerate(names))
    data = load("list", str(write(tmp_path, train_csv="image,label\n" + quoted, val_jsonl=lines)))
    want = [(str(tmp_path / name), f"l{i}") for i, name in enumerate(names)]
    assert rows(data.train, data) == rows(data.test, data) == want


def test_absolute_names_are_as_they_are(tmp_path):
    write(tmp_path, train_csv="image,label\n/data/a.jpg,cat\n", val_csv=CSV.replace("dog", "cat"))
    assert load("list", str(tmp_path)).train.paths == ("/data/a.jpg",)


# --- several labels


@pytest.mark.parametrize(
    "lists",
    [
        {"train_csv": "image,labels\na.jpg,cat|dog\nb.jpg,\nc.jpg,ant\nd.jpg,dog|dog\n"},
        {
            "train_jsonl": '{"image": "a.jpg", "labels": ["cat", "dog"]}\n{"image": "b.jpg", "labels": []}\n'
            '{"image": "c.jpg", "labels": ["ant"]}\n{"image": "d.jpg", "labels": ["dog", "dog"]}\n'
        },
    ],
)
def test_several_labels_are_rows_of_zeros_and_ones(lists, tmp_path):
    data = load("list", str(write(tmp_path, **lists, val_csv="image,labels\nv.jpg,dog\n")))
    assert data.class_names == ("ant", "cat", "dog")
    assert data.train.labels.dtype == torch.float32
    assert data.train.labels.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert data.test.labels.tolist() == [[0, 0, 1]]


@settings(max_examples=60)
@given(
    st.lists(st.frozensets(st.sampled_from("abcde"), max_size=3), min_size=4, max_size=60),
    st.sampled_from([0.1, 0.25, 0.5, 0.9]),
)
def test_a_list_of_several_labels_is_split_so_that_every_class_is_trained_on(tmp_path_factory, labels, fraction):
    path = tmp_path_factory.mktemp("lists") / "all.jsonl"
    path.write_text("".join(json.dumps({"image": f"{i}", "labels": sorted(s)}) + "\n" for i, s in enumerate(labels)))
    total = Counter(label for row in labels for label in row)
    try:
        data = load("list", str(path), val_fraction=fraction)
    except InputError as error:
        assert str(error).startswith("--val_fraction" if total else str(path))  # noqa: PT017
        return
    assert not set(data.train.paths) & set(data.test.paths)
    assert data.train.size + data.test.size == len(labels)
    found = dict(zip(data.class_names, data.train.labels.sum(0).tolist(), strict=True))
    for label, count in total.items():
        assert count - found[label] <= fraction * count + 0.5
        assert found[label] >= 1


# --- classes and splits


def test_classes_txt_fixes_the_order(tmp_path):
    write(tmp_path, train_csv=CSV, val_csv=CSV, classes_txt="zebra\r\ndog\n\ncat\n")
    data = load("list", str(tmp_path))
    assert data.class_names == ("zebra", "dog", "cat")
    assert data.train.labels.tolist() == [1, 2]


def test_a_single_list_is_split_by_class(tmp_path):
    lines = [f"{label}{i}.jpg,{label}\n" for label, count in (("a", 20), ("b", 10), ("c", 1)) for i in range(count)]
    write(tmp_path, one_csv="image,label\n" + "".join(lines), two_csv="image,label\n" + "".join(reversed(lines)))
    one, two = (load("list", str(tmp_path / name), val_fraction=0.2) for name in ("one.csv", "two.csv"))
    assert sorted(Path(path).name[0] for path in one.test.paths) == ["a"] * 4 + ["b"] * 2
    assert set(one.test.paths) == set(two.test.paths)  # whatever the order of lines
    assert set(one.train.paths) == set(two.train.paths)
    assert not set(one.train.paths) & set(one.test.paths)


# --- refusals


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("train_csv", "a.jpg,dog\n", 1, "found the columns a.jpg, dog, expected image and label"),
        ("train_csv", "image,label,labels\n", 1, "expected image and label, or image and labels"),
        ("train_csv", CSV + "\nc.jpg\n", 5, "found 1 cells, expected 2"),
        ("train_csv", CSV + "c.jpg,cat,dog\n", 4, "found 3 cells, expected 2"),
        ("train_csv", 'image,label\n"a\nb.jpg",cat\nc.jpg,\n', 4, "found an empty name"),
        ("train_csv", "image,label\n,cat\n", 2, "found an empty name"),
        ("train_csv", "image,labels\na.jpg,cat||dog\n", 2, "found an empty name"),
        ("train_csv", CSV + '"c.jpg,cat\n', 4, "found broken CSV"),
        ("train_csv", CSV.encode() + b"c\xff.jpg,cat\n", 4, "not UTF-8"),
        ("train_jsonl", JSONL + "{]\n", 3, "found {], expected"),
        ("train_jsonl", JSONL + '\n["c.jpg", "cat"]\n', 4, "expected"),
        ("train_jsonl", JSONL + '{"image": "c.jpg", "label": 3}\n', 3, "expected"),
        ("train_jsonl", JSONL + '{"image": "c.jpg", "labels": "cat"}\n', 3, "expected"),
        ("train_jsonl", JSONL + '{"image": "c.jpg", "labels": ["cat", 3]}\n', 3, "expected"),
        ("train_jsonl", JSONL + '{"image": "c\\ud800.jpg", "label": "cat"}\n', 3, "expected"),
        ("train_jsonl", JSONL + "[" * 100_000 + "\n", 3, "expected"),
        ("train_jsonl", JSONL + '{"image": "c.jpg", "labels": ["cat"]}\n', 3, "found labels, expected label"),
    ],
)
def test_lists_are_refused_by_line(name, text, line, message, tmp_path):
    write(tmp_path, **{name: text}, val_csv=CSV)
    found = refusal(tmp_path)
    assert found.startswith(f"{tmp_path / name.replace('_', '.')}: line {line}: found ")
    assert message in found
    assert len(found) < 500 + len(str(tmp_path))


def test_validation_has_no_classes_of_its_own(tmp_path):
    write(tmp_path, train_csv=CSV, val_csv=CSV + "z.jpg,zebra\n")
    assert f"{tmp_path / 'val.csv'}: line 4: found the class 'zebra', expected one of cat, dog" in refusal(tmp_path)


def test_one_label_and_several_do_not_mix(tmp_path):
    write(tmp_path, train_csv=CSV, val_csv="image,labels\na.jpg,cat\n")
    assert f"{tmp_path / 'val.csv'}: line 2: found labels, expected label" in refusal(tmp_path)


def test_classes_txt_must_have_all_and_each_once(tmp_path):
    write(tmp_path, train_csv=CSV, val_csv=CSV, classes_txt="cat\n")
    assert f"{tmp_path / 'train.csv'}: line 2: found the class 'dog'" in refusal(tmp_path)
    write(tmp_path, classes_txt="cat\ndog\ncat\n")
    assert f"{tmp_path / 'classes.txt'}: found 'cat' more than once" in refusal(tmp_path)


def test_an_image_listed_twice_is_not_split(tmp_path):
    write(tmp_path, all_csv=CSV + "a.jpg,cat\n")
    assert f"{tmp_path / 'all.csv'}: line 4: found a.jpg again (first in line 2)" in refusal(tmp_path / "all.csv")


@pytest.mark.parametrize("text", ["", "image,label\n", "\n\n"])
def test_empty_lists_are_refused(text, tmp_path):
    write(tmp_path, train_csv=text, val_csv=CSV)
    assert f"{tmp_path / 'train.csv'}: found no images" in refusal(tmp_path)


def test_missing_lists_are_refused(tmp_path):
    assert "found no list, expected train.csv or train.jsonl" in refusal(tmp_path)
    write(tmp_path, train_csv=CSV)
    assert "found no list, expected val.csv or val.jsonl" in refusal(tmp_path)
    assert "no such file or folder" in refusal(tmp_path / "absent.csv")
    assert "expected .csv or .jsonl" in refusal(write(tmp_path, list_txt=CSV) / "list.txt")
