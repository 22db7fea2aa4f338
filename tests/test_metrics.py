"""Measures against scikit-learn's, closed forms, and what holds for any predictions."""

import csv
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from vitfn import metrics
from vitfn.metrics import Predictions


def predictions(labels: torch.Tensor, logits: torch.Tensor) -> Predictions:
    """What a model that gives these logits (N, K) would be said to predict."""
    scores = logits.softmax(-1)
    confidence, predicted = scores.max(-1)
    in_top5 = (scores.topk(min(5, scores.shape[1])).indices == labels[:, None]).any(1)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return Predictions(labels, loss, predicted, confidence, in_top5)


def some(n: int, k: int, seed: int = 0) -> tuple[Predictions, torch.Tensor]:
    """Predictions that are right more often than not, and their logits."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=generator)
    logits = torch.randn(n, k, generator=generator)
    logits[torch.arange(n), labels] += 2
    return predictions(labels, logits), logits


def several(n: int, k: int, levels: int = 1000, seed: int = 0) -> Predictions:
    """Predictions of several labels an image, whose scores are one of `levels`."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, k, generator=generator) < 0.3).float()
    scores = (0.3 * labels + 0.7 * torch.rand(n, k, generator=generator)).mul(levels).round() / levels
    loss = torch.nn.functional.binary_cross_entropy(scores, labels, reduction="none").sum(1)
    return Predictions(labels, loss, scores > 0.5, scores, None)


def sure(confidence: list[float], right: list[bool]) -> Predictions:
    """Predictions of class 0, right or not, with these confidences."""
    labels = 1 - torch.tensor(right).long()
    return Predictions(labels, torch.zeros(len(labels)), labels * 0, torch.tensor(confidence), labels >= 0)


@pytest.mark.parametrize(("n", "k"), [(846, 10), (500, 100), (7, 3), (1, 2)])
def test_accuracies_and_loss_are_scikit_learn_s(n, k):
    p, logits = some(n, k)
    found = metrics.measures(p)
    assert {type(value) for value in found.values()} == {float}
    assert found["accuracy"] == sk.accuracy_score(p.labels, p.predicted)
    assert (found["correct"], found["count"]) == (sk.accuracy_score(p.labels, p.predicted, normalize=False), n)
    assert found["loss"] == pytest.approx(sk.log_loss(p.labels, logits.double().softmax(-1), labels=range(k)), rel=1e-6)
    if k > 5:
        assert found["top5"] == pytest.approx(sk.top_k_accuracy_score(p.labels, logits, k=5, labels=range(k)))


@pytest.mark.parametrize(("n", "k"), [(846, 10), (300, 100)])
def test_confusion_is_scikit_learn_s(n, k):
    p, _ = some(n, k)
    found = metrics.confusion(p, k)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found, sk.confusion_matrix(p.labels, p.predicted, labels=range(k)))


@pytest.mark.parametrize("p", [some(846, 10)[0], some(60, 40)[0], several(50, 10)], ids=["10", "40", "multi-label"])
def test_per_class_numbers_are_scikit_learn_s(p):
    k = p.labels.shape[1] if p.multi_label else int(torch.cat([p.labels, p.predicted]).max()) + 1
    rows = metrics.per_class(p, [f"class {i}" for i in range(k)])
    expected = sk.precision_recall_fscore_support(p.labels, p.predicted, labels=range(k), zero_division=np.nan)
    for name, want in zip(("precision", "recall", "f1"), expected, strict=False):
        found = np.array([getattr(row, name) for row in rows], float)  # None becomes nan
        np.testing.assert_allclose(found, want, rtol=1e-12, err_msg=name)
    assert [row.images for row in rows] == expected[3].tolist()
    assert sum(row.right for row in rows) == int(
        (p.predicted & (p.labels > 0)).sum() if p.multi_label else p.right.sum()
    )


def test_what_is_undefined_is_none():
    """Class 1 was never predicted, class 2 has no images, class 3 neither."""
    labels, predicted = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2])
    p = Predictions(labels, torch.zeros(3), predicted, torch.ones(3), labels == predicted)
    rows = metrics.per_class(p, "abcd")
    assert [row.recall for row in rows] == [1, 0, None, None]
    assert [row.precision for row in rows] == [0.5, None, 0, None]
    assert [row.f1 for row in rows] == [2 / 3, 0, 0, None]


@pytest.mark.parametrize("levels", [1000, 10, 1], ids=["hardly any ties", "many ties", "two scores"])
def test_average_precision_is_scikit_learn_s(levels):
    p = several(200, 7, levels)
    for labels, scores in zip(p.labels.T, p.confidence.T, strict=True):
        assert metrics.average_precision(labels, scores) == pytest.approx(sk.average_precision_score(labels, scores))
    assert metrics.measures(p)["mean_average_precision"] == pytest.approx(
        sk.average_precision_score(p.labels, p.confidence, average="macro")
    )


def test_several_labels_are_right_if_all_are():
    p = several(200, 3)
    found = metrics.measures(p)
    assert found.keys() == {"loss", "accuracy", "correct", "count", "mean_average_precision"}
    assert found["accuracy"] == sk.accuracy_score(p.labels, p.predicted)
    assert found["loss"] == pytest.approx(float(p.loss.mean()))


def test_a_class_without_images_is_left_out_of_the_mean_average_precision():
    labels, scores = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.9, 0.8], [0.1, 0.7]])
    assert metrics.mean_average_precision(labels, scores) == 1
    assert math.isnan(metrics.mean_average_precision(0 * labels, scores))
    assert math.isnan(metrics.mean_average_precision(labels, math.nan * scores))


def test_a_model_that_is_as_right_as_sure_is_calibrated():
    assert metrics.calibration_error(sure([0.75] * 4, [True, True, True, False])) == pytest.approx(0, abs=1e-7)
    assert metrics.calibration_error(sure([1.0] * 3, [True] * 3)) == 0


def test_a_model_that_is_always_90_percent_sure_and_half_right_is_off_by_40():
    assert metrics.calibration_error(sure([0.9] * 10, [True, False] * 5)) == pytest.approx(0.4)


def test_errors_of_different_bins_do_not_cancel_and_those_of_one_do():
    assert metrics.calibration_error(sure([0.9, 0.5], [False, True])) == pytest.approx((0.9 + 0.5) / 2)
    assert metrics.calibration_error(sure([0.51, 0.49], [False, True])) == pytest.approx(0, abs=1e-7)


def test_a_bin_holds_its_upper_edge():
    edges = (torch.arange(1, 16) / 15).tolist()
    assert metrics.calibration_bins(sure(edges, [True] * 15))[0].tolist() == [1] * 15
    above = torch.tensor(edges[:-1]).nextafter(torch.tensor(2.0)).tolist()
    assert metrics.calibration_bins(sure(above, [True] * 14))[0].tolist() == [0] + [1] * 14


def test_confidence_that_is_no_number_is_not_calibrated():
    assert math.isnan(metrics.calibration_error(sure([0.5, math.nan], [True, True])))


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 2**32))
def test_what_holds_for_any_predictions(k, n, seed):
    p, _ = some(n, k, seed)
    matrix, found = metrics.confusion(p, k), metrics.measures(p)
    rows = metrics.per_class(p, [str(i) for i in range(k)])
    assert int(matrix.sum()) == n == sum(row.images for row in rows)
    assert int(matrix.trace()) == found["correct"] == sum(row.right for row in rows)
    assert 0 <= found["calibration_error"] <= 1
    assert int(metrics.calibration_bins(p)[0].sum()) == n
    mistakes = metrics.most_confused(matrix, [str(i) for i in range(k)], k * k)
    assert sum(count for *_, count in mistakes) == n - found["correct"]
    assert all(true != taken and int(matrix[int(true), int(taken)]) == count > 0 for true, taken, count in mistakes)
    assert [count for *_, count in mistakes] == sorted((count for *_, count in mistakes), reverse=True)


def test_the_most_frequent_mistakes_come_first():
    matrix = torch.tensor([[9, 1, 0], [4, 9, 1], [0, 2, 9]])
    assert metrics.most_confused(matrix, "abc", 3) == [("b", "a", 4), ("c", "b", 2), ("a", "b", 1)]


HOSTILE = ['a "quoted", name', "two\nlines", "<script>"]


def test_tables_are_read_back_as_they_were(tmp_path):
    p, _ = some(60, 3)
    matrix, rows = metrics.confusion(p, 3), metrics.per_class(p, HOSTILE)
    metrics.write_confusion_csv(tmp_path / "confusion.csv", matrix, HOSTILE)
    metrics.write_per_class_csv(tmp_path / "classes.csv", [*rows, metrics.ClassRow("none", 0, 0, None, None, None)])
    with open(tmp_path / "confusion.csv", newline="") as file:
        (_, *header), *lines = csv.reader(file)
    assert header == [name for name, *_ in lines] == HOSTILE
    assert [[int(count) for count in counts] for _, *counts in lines] == matrix.tolist()
    with open(tmp_path / "classes.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["name"] for row in read] == [*HOSTILE, "none"]
    assert [float(row["recall"]) for row in read[:3]] == [row.recall for row in rows]
    assert list(read[3].values()) == ["none", "0", "0", "", "", ""]


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "confusion.csv"
    path.write_text("old")
    with pytest.raises(ValueError, match="zip"):
        metrics.write_confusion_csv(path, torch.zeros(3, 3), ["a"])
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("confusion.csv", "old")]


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path):
    """As a folder's name on Linux can be."""
    metrics.write_confusion_csv(tmp_path / "confusion.csv", torch.zeros(1, 1), ["caf\udce9"])
    assert (tmp_path / "confusion.csv").read_text(encoding="utf-8").startswith("true \\ predicted,caf?\n")
