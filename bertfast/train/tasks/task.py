"""What a task is: how its files are read, what the model is fed, what its logits mean, how good they are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bertfast.train.features import Feature
from bertfast.train.metrics import Metrics

_PORTION = 1024  # rows that are cut into tokens at a time: what tokenizers return is many times larger than a feature


class Encoded(NamedTuple):
    """The features of some rows, and what had to be done to rows on the way, in words, with how often."""

    features: list[Feature]
    changes: Counter[str]


@dataclass(frozen=True)
class Task:
    """A task with its settings, which are all that has to be known to use a model fine-tuned for it.

    name: on the command line. head: transformers' class of models for it. packages: the modules its metrics take.
    labels_of: what the head labels, see `Runner`. metric: the one by which the best model is kept; more is better.
    labels: of the classes, in the order of the model's logits; none for tasks without classes.
    max_length: tokens of a sequence, special ones included.
    """

    name: ClassVar[str]
    head: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    labels_of: ClassVar[str]
    metric: ClassVar[str]

    labels: tuple[str, ...] = ()
    max_length: int = 0

    def read(self, path: str | Path, labelled: bool = True) -> list[Any]:
        """The rows of a file. DataError where something in it is wrong, labels that the task does not know included."""
        raise NotImplementedError

    def fit(self, rows: Sequence[Any]) -> "Task":
        """The task with what its training rows say, the labels above all. DataError where they cannot be learned."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Fields of the model's configuration that the task decides: the labels by number, and what else there is."""
        if not self.labels:
            return {}
        by_number = dict(enumerate(self.labels))
        return {"num_labels": len(by_number), "id2label": by_number, "label2id": {v: k for k, v in by_number.items()}}

    def stratum(self, row: Any) -> Any:
        """Rows of one stratum are dealt out evenly between training and evaluation."""
        return None

    def encode(self, rows: Sequence[Any], tokenizer: Any) -> Encoded:
        """What the model is fed for these rows, with labels where the rows have them."""
        whole = Encoded([], Counter())
        for start in range(0, len(rows), _PORTION):
            portion = self._encode(rows[start : start + _PORTION], tokenizer)
            whole.features.extend(replace(feature, row=start + feature.row) for feature in portion.features)
            whole.changes.update(portion.changes)
        return whole

    def _encode(self, rows: Sequence[Any], tokenizer: Any) -> Encoded:
        raise NotImplementedError

    def decode(
        self, rows: Sequence[Any], features: Sequence[Feature], logits: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """One prediction a row, of the logits of each feature."""
        raise NotImplementedError

    def measure(self, rows: Sequence[Any], predictions: Sequence[dict[str, Any]]) -> Metrics:
        """How good predictions for rows with labels are."""
        raise NotImplementedError

    def confusion(self, rows: Sequence[Any], predictions: Sequence[dict[str, Any]]) -> list[list[int]] | None:
        """How often each label (rows) was taken for each (columns); None for tasks without classes."""
        return None
