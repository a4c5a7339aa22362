"""Tasks of whole texts, or pairs of texts: which class they belong to, or which number they get."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bertfast.errors import DataError
from bertfast.train.features import Feature
from bertfast.train.metrics import (
    Metrics,
    classification_metrics,
    confusion_matrix,
    regression_metrics,
)
from bertfast.train.rows import Columns, TextRow, read_texts
from bertfast.train.tasks.task import Encoded, Task


@dataclass(frozen=True)
class _TextTask(Task):
    """text_column, pair_column, label_column: names of the table's columns; None for the defaults."""

    head: ClassVar[str] = "AutoModelForSequenceClassification"
    packages: ClassVar[tuple[str, ...]] = ("sklearn",)
    labels_of: ClassVar[str] = "sequence"
    paired: ClassVar[bool | None]

    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None

    def read(self, path: str | Path, labelled: bool = True) -> list[TextRow]:
        columns = Columns(self.text_column, self.pair_column, self.label_column)
        return [self.check(row) for row in read_texts(path, columns, paired=self.paired, labelled=labelled)]

    def check(self, row: TextRow) -> TextRow:
        """The row with the label that the task knows it by. DataError for a label that is none."""
        return row

    def _encode(self, rows: Sequence[TextRow], tokenizer: Any) -> Encoded:
        tokens = _tokens(rows, tokenizer, truncation=False)
        long = [i for i, (ids, _) in enumerate(tokens) if len(ids) > self.max_length]
        if long:
            cut = _tokens([rows[i] for i in long], tokenizer, truncation=True, max_length=self.max_length)
            for i, shorter in zip(long, cut, strict=True):
                tokens[i] = shorter
        features = [Feature(i, *tokens[i], self.target(row)) for i, row in enumerate(rows)]
        changes = Counter({f"rows were cut to {self.max_length} tokens": len(long)} if long else {})
        return Encoded(features, changes)

    def target(self, row: TextRow) -> int | float | None:
        """What the model's head is trained to."""
        raise NotImplementedError


@dataclass(frozen=True)
class Classification(_TextTask):
    """Which of several classes a text belongs to."""

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    paired: ClassVar[bool | None] = False

    def fit(self, rows: Sequence[TextRow]) -> "Classification":
        labels = sorted({str(row.label) for row in rows}, key=_by_number)
        if len(labels) < 2:
            raise DataError(f"{rows[0].place}: every row has the label {labels[0]!r}: there is nothing to tell apart")
        return replace(self, labels=tuple(labels))

    def check(self, row: TextRow) -> TextRow:
        if self.labels and row.label is not None and row.label not in self.labels:
            raise DataError(f"{row.place}: unknown label {row.label!r}: the model knows {', '.join(self.labels)}")
        return row

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "problem_type": "single_label_classification"}

    def target(self, row: TextRow) -> int | None:
        return None if row.label is None else self.labels.index(row.label)

    def stratum(self, row: TextRow) -> str:
        return str(row.label)

    def decode(
        self, rows: Sequence[TextRow], features: Sequence[Feature], logits: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        predictions = []
        for scores in logits:
            exps = np.exp(scores - scores.max())
            shares = dict(zip(self.labels, (exps / exps.sum()).tolist(), strict=True))
            best = self.labels[int(scores.argmax())]
            predictions.append({"label": best, "score": shares[best], "scores": shares})
        return predictions

    def measure(self, rows: Sequence[TextRow], predictions: Sequence[dict[str, Any]]) -> Metrics:
        numbers = {label: i for i, label in enumerate(self.labels)}
        gold = [numbers[str(row.label)] for row in rows]
        return classification_metrics(gold, [numbers[p["label"]] for p in predictions], len(self.labels))

    def confusion(self, rows: Sequence[TextRow], predictions: Sequence[dict[str, Any]]) -> list[list[int]]:
        return confusion_matrix([str(row.label) for row in rows], [p["label"] for p in predictions], self.labels)


@dataclass(frozen=True)
class Pairs(Classification):
    """Which of several classes a pair of texts belongs to."""

    name: ClassVar[str] = "pairs"
    paired: ClassVar[bool | None] = True


@dataclass(frozen=True)
class Regression(_TextTask):
    """Which number a text, or a pair of texts, gets."""

    name: ClassVar[str] = "regression"
    packages: ClassVar[tuple[str, ...]] = ("scipy",)
    metric: ClassVar[str] = "correlation"
    paired: ClassVar[bool | None] = None

    def fit(self, rows: Sequence[TextRow]) -> "Regression":
        if len({row.label for row in rows}) < 2:
            raise DataError(f"{rows[0].place}: every row has the value {rows[0].label}: there is nothing to learn")
        return self

    def check(self, row: TextRow) -> TextRow:
        if row.label is None:
            return row
        try:
            value = float(row.label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{row.place}: the label {row.label!r} is not a number, which regression wants")
        return replace(row, label=value)

    def settings(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def target(self, row: TextRow) -> float | None:
        return None if row.label is None else float(row.label)

    def decode(
        self, rows: Sequence[TextRow], features: Sequence[Feature], logits: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        return [{"value": float(value)} for [value] in logits]

    def measure(self, rows: Sequence[TextRow], predictions: Sequence[dict[str, Any]]) -> Metrics:
        return regression_metrics([self.target(row) for row in rows], [p["value"] for p in predictions])


def _tokens(rows: Sequence[TextRow], tokenizer: Any, **how: Any) -> list[tuple[list[int], list[int] | None]]:
    """The ids and types of each row's tokens."""
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    columns = tokenizer([row.text for row in rows], pairs, padding=False, **how)
    types = columns.get("token_type_ids") or [None] * len(rows)
    return list(zip(columns["input_ids"], types, strict=True))


def _by_number(label: str) -> tuple[float, str]:
    """Labels that are numbers in their order, before words in theirs."""
    try:
        return float(label), label
    except ValueError:
        return math.inf, label
