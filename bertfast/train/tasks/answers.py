"""Answers to questions, cut out of a text: where they begin and end. Devlin et al. 2019, sections 4.2 and 4.3."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bertfast.errors import DataError
from bertfast.train.features import Feature
from bertfast.train.metrics import Metrics, answer_metrics
from bertfast.train.rows import QuestionRow, read_questions
from bertfast.train.tasks.task import Encoded, Task

_CANDIDATES = 20  # of a window, and of all: those that share the probability
Span = tuple[int, int]


@dataclass(frozen=True)
class Places:
    """Where a window's tokens stand in the context, and the token that stands for "no answer in this window", [CLS].

    spans: (tokens, 2) int32, the first character of each and the one behind its last; 0 and 0 for what is not of it.
    """

    spans: np.ndarray
    null: int

    @property
    def inside(self) -> np.ndarray:
        """(tokens,) bool: which of them stand in the context."""
        return self.spans[:, 1] > self.spans[:, 0]


@dataclass(frozen=True)
class Answers(Task):
    """Question answering: a context longer than max_length runs in windows that overlap by `stride` tokens.

    max_answer_length: in tokens. impossible: whether "no answer" may be the answer, as in SQuAD v2; training data says.
    """

    name: ClassVar[str] = "qa"
    head: ClassVar[str] = "AutoModelForQuestionAnswering"
    packages: ClassVar[tuple[str, ...]] = ()
    labels_of: ClassVar[str] = "span"
    metric: ClassVar[str] = "f1"

    stride: int = 0
    max_answer_length: int = 30
    impossible: bool = False

    def read(self, path: str | Path, labelled: bool = True) -> list[QuestionRow]:
        return read_questions(path, labelled=labelled)

    def fit(self, rows: Sequence[QuestionRow]) -> "Answers":
        if not any(row.answers for row in rows):
            raise DataError(f"{rows[0].place}: no question has an answer: there is nothing to learn")
        return replace(self, impossible=not all(row.answers for row in rows))

    def stratum(self, row: QuestionRow) -> bool:
        return bool(row.answers)

    def _encode(self, rows: Sequence[QuestionRow], tokenizer: Any) -> Encoded:
        room = self.max_length - tokenizer.num_special_tokens_to_add(pair=True) - self.stride - 1
        questions = [row.question.strip() for row in rows]
        lengths = map(len, tokenizer(questions, add_special_tokens=False)["input_ids"])
        for row, length in zip(rows, lengths, strict=True):
            if length > room:
                raise DataError(
                    f"{row.place}: question {row.id} has {length} tokens, which leaves no room for its context: "
                    "give a larger --max-length, or a smaller --stride"
                )
        encoded = tokenizer(
            questions,
            [row.context for row in rows],
            padding=False,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        places = [
            _places(encoded["offset_mapping"][window], encoded.sequence_ids(window), ids, tokenizer)
            for window, ids in enumerate(encoded["input_ids"])
        ]
        origins = encoded["overflow_to_sample_mapping"]
        wholes = _answer_tokens(rows, origins, places)
        types = encoded.get("token_type_ids") or [None] * len(origins)
        features = [
            Feature(row, ids, kinds, find_answer(wholes[row], place), place)
            for row, ids, kinds, place in zip(origins, encoded["input_ids"], types, places, strict=True)
        ]
        more = len(features) - len(rows)
        change = f"windows more, for contexts longer than {self.max_length} tokens"
        return Encoded(features, Counter({change: more} if more else {}))

    def decode(
        self, rows: Sequence[QuestionRow], features: Sequence[Feature], logits: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        candidates: list[list[tuple[float, Span]]] = [[] for _ in rows]
        nulls = [np.inf] * len(rows)  # that of the window which is least sure that it holds no answer
        for feature, scores in zip(features, logits, strict=True):
            candidates[feature.row] += best_spans(scores, feature.places, self.max_answer_length)
            nulls[feature.row] = min(nulls[feature.row], float(scores[feature.places.null].sum()))
        return [
            {"id": row.id, **choose(row.context, found, null if self.impossible else None)}
            for row, found, null in zip(rows, candidates, nulls, strict=True)
        ]

    def measure(self, rows: Sequence[QuestionRow], predictions: Sequence[dict[str, Any]]) -> Metrics:
        return answer_metrics([[a.text for a in row.answers] for row in rows], [p["answer"] for p in predictions])


def _places(offsets: Sequence[Span], parts: Sequence[int | None], ids: list[int], tokenizer: Any) -> Places:
    if tokenizer.cls_token_id not in ids:
        raise DataError("this tokenizer puts no [CLS] before a question, which would stand for no answer")
    spans = [span if part == 1 else (0, 0) for span, part in zip(offsets, parts, strict=True)]
    return Places(np.array(spans, dtype=np.int32), ids.index(tokenizer.cls_token_id))


def _answer_tokens(rows: Sequence[QuestionRow], origins: Sequence[int], windows: Sequence[Places]) -> list[set[Span]]:
    """For each row the tokens of its first answer, by their characters, from whatever windows they are in."""
    tokens: list[set[Span]] = [set() for _ in rows]
    for row, places in zip(origins, windows, strict=True):
        for answer in rows[row].answers[:1]:
            start, end = answer.start, answer.start + len(answer.text)
            found = places.inside & (places.spans[:, 0] < end) & (places.spans[:, 1] > start)
            tokens[row] |= set(map(tuple, places.spans[found].tolist()))
    for row, found in zip(rows, tokens, strict=True):
        if row.answers and not found:
            raise DataError(f"{row.place}: the answer to question {row.id} is nothing to the tokenizer: leave it out")
    return tokens


def find_answer(answer: set[Span], places: Places) -> Span:
    """The first and last token of an answer that has these tokens; twice the null token where the window lacks some."""
    spans = list(map(tuple, places.spans.tolist()))
    found = [i for i, span in enumerate(spans) if span in answer]
    if not found or {spans[i] for i in found} != answer:
        return places.null, places.null
    return found[0], found[-1]


def best_spans(logits: np.ndarray, places: Places, longest: int) -> list[tuple[float, Span]]:
    """The best spans of a window, the best first, as (score, characters): the start's logit plus the end's.

    logits: (tokens, 2). Spans begin and end in the context, not before they begin, and have `longest` tokens or fewer.
    """
    starts, ends = (np.where(places.inside, logits[:, side], -np.inf) for side in (0, 1))
    ends = np.pad(ends, (0, longest - 1), constant_values=-np.inf)
    scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(ends, longest)  # (first token, length - 1)
    found = []
    for place in np.argsort(-scores, axis=None, kind="stable")[:_CANDIDATES].tolist():
        first, more = divmod(place, longest)
        if scores[first, more] > -np.inf:
            span = int(places.spans[first, 0]), int(places.spans[first + more, 1])
            found.append((float(scores[first, more]), span))
    return found


def choose(context: str, candidates: Sequence[tuple[float, Span]], null: float | None) -> dict[str, Any]:
    """The best of all windows' candidates with its place and its probability among the best of them.

    null: the score of no answer, which wins unless another is higher; None where there has to be an answer. No answer
    is the empty text without a place, and so is that of a context in which no span is possible.
    """
    highest: dict[Span, float] = {}
    for score, span in candidates:
        highest[span] = max(score, highest.get(span, -np.inf))
    best = sorted(highest, key=lambda span: -highest[span])[:_CANDIDATES]
    scores = np.array([highest[span] for span in best] + ([] if null is None else [null]))
    if not len(scores):
        return {"answer": "", "start": None, "end": None, "score": 0.0}
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    if null is not None and null >= scores.max():
        return {"answer": "", "start": None, "end": None, "score": float(shares[-1])}
    start, end = best[0]
    text = context[start:end]  # some tokenizers count the space before a word as part of it
    start += len(text) - len(text.lstrip())
    return {"answer": text.strip(), "start": start, "end": start + len(text.strip()), "score": float(shares[0])}
