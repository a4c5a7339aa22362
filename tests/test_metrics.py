"""Metrics against values by hand, and SQuAD's against its rules."""

import math
from pathlib import Path

import pytest

from bertfast.train.figures import draw_confusion
from bertfast.train.metrics import (
    answer_metrics,
    classification_metrics,
    confusion_matrix,
    entity_metrics,
    normalize,
    regression_metrics,
    word_f1,
)


def test_classification() -> None:
    pytest.importorskip("sklearn")
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    gold, predicted = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    f1, other = 6 / 9, 8 / 11
    matthews = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    expected = {"accuracy": 0.7, "macro_f1": (f1 + other) / 2, "matthews": matthews, "f1": f1}
    assert classification_metrics(gold, predicted, 2) == pytest.approx(expected)
    assert "f1" not in classification_metrics([0, 1, 2], [0, 1, 1], 3)
    assert confusion_matrix(["a", "a", "b"], ["a", "b", "b"], ["b", "a", "c"]) == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_regression() -> None:
    pytest.importorskip("scipy")
    gold, predicted = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-0.5, -1.5, 1.5, 0.5): 3 of 5. Ranks are the values.
    expected = {"pearson": 0.6, "spearman": 0.6, "correlation": 0.6, "rmse": 1.0}
    assert regression_metrics(gold, predicted) == pytest.approx(expected)
    monotonic = regression_metrics(gold, [0.0, 1.0, 2.0, 9.0])
    assert monotonic["pearson"] != pytest.approx(monotonic["spearman"])
    assert monotonic["correlation"] == pytest.approx((monotonic["pearson"] + monotonic["spearman"]) / 2)
    for constant in (regression_metrics(gold, [1.0] * 4), regression_metrics([1.0], [2.0])):
        assert math.isnan(constant["correlation"]) and math.isfinite(constant["rmse"])


@pytest.mark.filterwarnings("error")
def test_entities() -> None:
    pytest.importorskip("seqeval")
    gold = [("B-PER", "I-PER", "O", "B-LOC"), ("O", "B-LOC", "B-LOC")]
    predicted = [("B-PER", "I-PER", "O", "B-PER"), ("O", "B-LOC", "I-LOC")]
    # Right: the first person. Predicted: 3 (one of them long); true: 4.
    found = entity_metrics(gold, predicted)
    assert found["precision"] == pytest.approx(1 / 3) and found["recall"] == pytest.approx(1 / 4)
    assert found["f1"] == pytest.approx(2 / 7) and found["word_accuracy"] == pytest.approx(5 / 7)
    assert found["f1 PER"] == pytest.approx(2 / 3) and found["f1 LOC"] == 0


def test_no_entities() -> None:
    pytest.importorskip("seqeval")
    assert entity_metrics([("O", "O")], [("O", "O")])["f1"] == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Cat,", "cat"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre another", "theatre another"),
        ("well-known", "wellknown"),
        ("a.b", "ab"),
        ("the", ""),
    ],
)
def test_normalisation(answer: str, expected: str) -> None:
    assert normalize(answer) == expected


def test_words_shared() -> None:
    assert word_f1("the red cat", "a red dog") == pytest.approx(0.5)
    assert word_f1("cat cat dog", "cat") == pytest.approx(0.5)
    assert word_f1("cat", "dog") == 0
    assert word_f1("", "the") == 1 and word_f1("cat", "") == 0 and word_f1("", "cat") == 0


def test_answers() -> None:
    gold = [["red cat", "cat"], ["Köln"], []]
    found = answer_metrics(gold, ["The cat!", "in Köln", ""])
    assert found["exact"] == pytest.approx(2 / 3) and found["f1"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert found["f1 with answer"] == pytest.approx(5 / 6) and found["f1 without answer"] == 1
    assert answer_metrics([[]], ["cat"])["f1"] == 0
    assert set(answer_metrics([["the"]], [""])) == {"f1", "exact"}
    assert answer_metrics([["the"]], [""])["exact"] == 1, "of that answer nothing remains"
    assert answer_metrics([["the", "cat"]], [""])["exact"] == 0, "another answer does"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [["a"], ["$x^$", "漢字", "b"], [str(i) for i in range(32)]], ids=len)
def test_a_picture(tmp_path: Path, labels: list[str]) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    draw_confusion([[i + j for i in range(len(labels))] for j in range(len(labels))], labels, tmp_path / "c.png")
    with image.open(tmp_path / "c.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == picture.height
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 2
