"""Pairs of text segments, of which the second follows the first or does not: Devlin et al. 2019, appendix A.2."""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from bertfast.train.corpus import Corpus

ADDED_TOKENS = 3  # [CLS] A [SEP] B [SEP]
SHORTEST = ADDED_TOKENS + 2  # the least max_length: a token a segment
_SHORT = 0.1  # of the examples aim at a random shorter length, so that the model sees such too


class Pairs(NamedTuple):
    """Examples, by where their segments lie among the corpus's tokens; all (examples,) int64.

    a_begin, a_end, b_begin, b_end: the first token, and the one behind the last. random: 0 where B follows A, 1 where
    it is of another document, which are transformers' labels.
    """

    a_begin: np.ndarray
    a_end: np.ndarray
    b_begin: np.ndarray
    b_end: np.ndarray
    random: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each example, special ones included, (examples,) int64."""
        return self.a_end - self.a_begin + self.b_end - self.b_begin + ADDED_TOKENS

    def take(self, places: np.ndarray | slice) -> "Pairs":
        """Some of the examples."""
        return Pairs(*(column[places] for column in self))


def draw_pairs(corpus: Corpus, documents: np.ndarray, max_length: int, rng: np.random.Generator) -> Pairs:
    """Examples of at most max_length tokens from these documents, each read from its beginning to its end.

    As BERT makes them: sentences are gathered up to the wanted length and cut in two at a random border. In half of
    the cases, and where there is one sentence only, the second part goes back, and a random passage of another
    document takes its place. What is too long is cut at either end, token by token at random. Other than BERT, a
    sentence longer than any example is not lost: it is cut into pieces, which count as sentences. The same generator
    gives the same examples.
    """
    longest = max_length - ADDED_TOKENS
    sentences = np.asarray(corpus.sentences)  # no np.memmap: its slices take microseconds
    firsts, lasts = corpus.documents[documents].tolist(), corpus.documents[documents + 1].tolist()
    rows: list[tuple[int, int, int, int, int]] = []
    for document, first, last in zip(documents.tolist(), firsts, lasts, strict=True):
        rows += _walk(document, _borders(sentences[first : last + 1], longest).tolist(), longest, rng)
    own, a_begin, a_end, b_end, wanted = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    b_begin = a_end.copy()
    random = b_end == a_end
    b_begin[random], b_end[random] = _draw_others(corpus, own[random], wanted[random], longest, rng)
    return _truncate(Pairs(a_begin, a_end, b_begin, b_end, random.astype(np.int64)), longest, rng)


def _pieces(lengths: np.ndarray, longest: int) -> np.ndarray:
    """Into how many pieces sentences of these lengths are cut: those that fit no example, into eighths of one."""
    return np.where(lengths > longest, -(-lengths // max(longest // 8, 1)), 1)


def _borders(borders: np.ndarray, longest: int) -> np.ndarray:
    """Where the pieces of a document's sentences begin and end, given where the sentences do."""
    lengths = borders[1:] - borders[:-1]
    if lengths.max() <= longest:
        return borders
    pieces = _pieces(lengths, longest)
    numbers = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = np.repeat(borders[:-1], pieces) + np.repeat(lengths, pieces) * numbers // np.repeat(pieces, pieces)
    return np.append(cut, borders[-1])


def _walk(
    document: int, borders: list[int], longest: int, rng: np.random.Generator
) -> list[tuple[int, int, int, int, int]]:
    """The examples of a document: its number, A's begin and end, B's end, and how many tokens B should have.

    Where B is to come from elsewhere, its end is A's.
    """
    rows = []
    last = len(borders) - 1
    draws = iter(rng.random((last, 4)).tolist())  # at least one sentence goes into each example
    first = 0
    while first < last:
        short, length, cut, coin = next(draws)
        wanted = 2 + int(length * (longest - 1)) if short < _SHORT else longest
        end = min(bisect_left(borders, borders[first] + wanted, first + 1), last)
        middle = first + 1 + int(cut * (end - first - 1))
        follows = middle < end and coin < 0.5
        begin, border = borders[first], borders[middle]
        rows.append((document, begin, border, borders[end] if follows else border, wanted - (border - begin)))
        first = end if follows else middle
    return rows


def _draw_others(
    corpus: Corpus, own: np.ndarray, wanted: np.ndarray, longest: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Where random passages of documents other than these begin and end: of as many sentences as hold `wanted` tokens.

    They begin with any sentence, and end with the document where that comes first.
    """
    documents, sentences = np.asarray(corpus.documents), np.asarray(corpus.sentences)
    other = rng.integers(0, len(documents) - 2, len(own))
    other += other >= own
    first, last = documents[other], documents[other + 1]
    sentence = rng.integers(first, last)
    length = sentences[sentence + 1] - sentences[sentence]
    pieces = _pieces(length, longest)
    begin = sentences[sentence] + length * rng.integers(0, pieces) // pieces
    # The first border at which there is enough; inside the last sentence, if that is one of those that are cut.
    enough = np.maximum(begin + wanted, begin + 1)
    closing = np.minimum(np.searchsorted(sentences, enough), last) - 1
    opening = sentences[closing]
    length = sentences[closing + 1] - opening
    pieces = _pieces(length, longest)
    piece = np.minimum(-(-(enough - opening) * pieces // length), pieces)
    return begin, opening + length * piece // pieces


def _truncate(pairs: Pairs, longest: int, rng: np.random.Generator) -> Pairs:
    """Each pair cut to `longest` tokens: one by one the longer segment (B, of equals) loses its first or its last."""
    a_begin, a_end, b_begin, b_end, random = pairs
    a, b = a_end - a_begin, b_end - b_begin
    half = longest // 2
    a_kept = np.where(a + b <= longest, a, np.clip(longest - b, np.minimum(a, longest - half), a))
    b_kept = np.where(a + b <= longest, b, longest - a_kept)
    a_first, b_first = rng.binomial(a - a_kept, 0.5), rng.binomial(b - b_kept, 0.5)
    a_begin, b_begin = a_begin + a_first, b_begin + b_first
    return Pairs(a_begin, a_begin + a_kept, b_begin, b_begin + b_kept, random)
