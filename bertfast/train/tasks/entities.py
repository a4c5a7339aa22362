"""Named entities: a tag for each word of a sentence."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bertfast.errors import DataError
from bertfast.train.features import Feature
from bertfast.train.metrics import Metrics, confusion_matrix, entity_metrics
from bertfast.train.rows import TaggedRow, read_tagged
from bertfast.train.tasks.task import Encoded, Task

OUTSIDE = "O"
_TAG = re.compile(r"O|[BIES]-.+", re.DOTALL)
_UNLABELLED = -100  # what losses ignore


@dataclass(frozen=True)
class Entities(Task):
    """Tags of words in any of the IOB schemes (O, B-, I-, E-, S-): a word's first token has the label of the word.

    A sentence longer than max_length runs in several windows, one behind another, so that every word gets a tag.
    """

    name: ClassVar[str] = "ner"
    head: ClassVar[str] = "AutoModelForTokenClassification"
    packages: ClassVar[tuple[str, ...]] = ("sklearn", "seqeval")
    labels_of: ClassVar[str] = "token"
    metric: ClassVar[str] = "f1"

    def read(self, path: str | Path, labelled: bool = True) -> list[TaggedRow]:
        rows = read_tagged(path, labelled=labelled)
        for row in rows:
            for tag in dict.fromkeys(row.tags or ()):
                if not _TAG.fullmatch(tag):
                    raise DataError(f"{row.place}: the tag {tag!r} is not O, nor one of B-, I-, E- and S- with a kind")
                if self.labels and tag not in self.labels:
                    raise DataError(f"{row.place}: unknown tag {tag!r}: the model knows {', '.join(self.labels)}")
        return rows

    def fit(self, rows: Sequence[TaggedRow]) -> "Entities":
        found = {tag for row in rows for tag in row.tags or ()}
        if found <= {OUTSIDE}:
            raise DataError(f"{rows[0].place}: every word has the tag O: there is nothing to find")
        # Both of each kind, so that a kind may be one word long here and two in the next file.
        found |= {prefix + tag[1:] for tag in found - {OUTSIDE} for prefix in "BI"}
        return replace(self, labels=(OUTSIDE, *sorted(found - {OUTSIDE}, key=lambda tag: (tag[2:], tag[0]))))

    def _encode(self, rows: Sequence[TaggedRow], tokenizer: Any) -> Encoded:
        encoded = tokenizer(
            [list(row.words) for row in rows],
            is_split_into_words=True,
            padding=False,
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
        )
        numbers = {tag: i for i, tag in enumerate(self.labels)}
        types = encoded.get("token_type_ids") or [None] * len(encoded["input_ids"])
        features = []
        seen = set()
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            firsts: list[int | None] = []  # the word that begins with each token
            for word in encoded.word_ids(window):
                begins = word is not None and (row, word) not in seen
                firsts.append(word if begins else None)
                seen.add((row, word))
            tags = rows[row].tags
            labels = None if tags is None else [_UNLABELLED if w is None else numbers[tags[w]] for w in firsts]
            features.append(Feature(row, encoded["input_ids"][window], types[window], labels, firsts))
        return Encoded(features, self._changes(rows, features))

    def _changes(self, rows: Sequence[TaggedRow], features: Sequence[Feature]) -> Counter[str]:
        words = sum(len(row.words) for row in rows)
        found = sum(word is not None for feature in features for word in feature.places)
        changes = {
            f"windows more, for sentences longer than {self.max_length} tokens": len(features) - len(rows),
            "words are nothing to the tokenizer and count as tagged O": words - found,
        }
        return Counter({change: count for change, count in changes.items() if count})

    def decode(
        self, rows: Sequence[TaggedRow], features: Sequence[Feature], logits: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        tags = [[OUTSIDE] * len(row.words) for row in rows]
        shares = [[1.0] * len(row.words) for row in rows]
        for feature, scores in zip(features, logits, strict=True):
            exps = np.exp(scores - scores.max(-1, keepdims=True))
            found = (exps / exps.sum(-1, keepdims=True)).max(-1).tolist()
            for token, (word, best) in enumerate(zip(feature.places, scores.argmax(-1).tolist(), strict=True)):
                if word is not None:
                    tags[feature.row][word], shares[feature.row][word] = self.labels[best], found[token]
        return [
            {"tokens": list(row.words), "tags": tags[i], "entities": list(_entities(row.words, tags[i], shares[i]))}
            for i, row in enumerate(rows)
        ]

    def measure(self, rows: Sequence[TaggedRow], predictions: Sequence[dict[str, Any]]) -> Metrics:
        return entity_metrics([row.tags for row in rows], [p["tags"] for p in predictions])

    def confusion(self, rows: Sequence[TaggedRow], predictions: Sequence[dict[str, Any]]) -> list[list[int]]:
        gold = [tag for row in rows for tag in row.tags]
        return confusion_matrix(gold, [tag for p in predictions for tag in p["tags"]], self.labels)


def _entities(words: Sequence[str], tags: Sequence[str], shares: Sequence[float]) -> Iterator[dict[str, Any]]:
    """The entities that the tags mark, words[start:end] each, with the mean of their words' probabilities."""
    from seqeval.metrics.sequence_labeling import get_entities

    for kind, first, last in get_entities(list(tags)):
        score = sum(shares[first : last + 1]) / (last + 1 - first)
        yield {"type": kind, "start": first, "end": last + 1, "text": " ".join(words[first : last + 1]), "score": score}
