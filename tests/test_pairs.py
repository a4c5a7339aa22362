"""Sentence pairs: their statistics, and that each is where it says it is."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertfast.train.pairs import SHORTEST, Pairs, draw_pairs


def make_corpus(documents: list[list[int]]) -> SimpleNamespace:
    """Documents by the lengths of their sentences; what the tokens are does not matter here."""
    sentences = np.cumsum([0, *chain(*documents)])
    return SimpleNamespace(sentences=sentences, documents=np.cumsum([0, *map(len, documents)]))


def draw(corpus: SimpleNamespace, max_length: int, seed: int = 0) -> Pairs:
    everything = np.arange(len(corpus.documents) - 1)
    return draw_pairs(corpus, everything, max_length, np.random.default_rng(seed))


def ordinary(rng: np.random.Generator, documents: int = 400) -> SimpleNamespace:
    return make_corpus([rng.integers(1, 50, rng.integers(1, 80)).tolist() for _ in range(documents)])


def document_of(corpus: SimpleNamespace, places: np.ndarray) -> np.ndarray:
    return np.searchsorted(corpus.sentences[corpus.documents], places, side="right") - 1


def near(count: int, of: int, share: float) -> bool:
    """Whether a binomial count is within 5 standard deviations."""
    return abs(count - of * share) < 5 * (of * share * (1 - share)) ** 0.5


def test_segments_and_labels():
    corpus = ordinary(np.random.default_rng(0))
    pairs = draw(corpus, 128)
    a, b = pairs.a_end - pairs.a_begin, pairs.b_end - pairs.b_begin
    assert (a > 0).all() and (b > 0).all() and (pairs.lengths == a + b + 3).all()
    assert pairs.lengths.max() == 128 and all(column.dtype == np.int64 for column in pairs)
    first, second = document_of(corpus, pairs.a_begin), document_of(corpus, pairs.b_begin)
    assert (first == document_of(corpus, pairs.a_end - 1)).all()
    assert (second == document_of(corpus, pairs.b_end - 1)).all()
    follows = pairs.random == 0
    assert (first[follows] == second[follows]).all() and (first[~follows] != second[~follows]).all()
    # What is not full was not cut, and what was not cut is whole sentences, the second right behind the first.
    whole = pairs.lengths < 128
    assert (pairs.b_begin == pairs.a_end)[whole & follows].all()
    assert (pairs.b_begin >= pairs.a_end)[follows].all()
    for column in pairs[:4]:
        assert np.isin(column[whole], corpus.sentences).all() and not np.isin(column[~whole], corpus.sentences).all()


def test_half_of_them_follow():
    corpus = make_corpus([[10] * 40_000, [9] * 40_000, [11] * 40_000])
    pairs = draw(corpus, 64)
    assert len(pairs.random) > 20_000 and near(int(pairs.random.sum()), len(pairs.random), 0.5)


def test_a_tenth_are_shorter():
    """Of sentences of one token each, a pair that follows has exactly the length that was aimed at."""
    corpus = make_corpus([[1] * 40_000, [1] * 40_000])
    pairs = draw(corpus, 35)
    lengths = pairs.lengths[pairs.random == 0] - 3
    short = lengths[lengths < 32]
    # A random length is the full one once in 31 times.
    assert near(len(short), len(lengths), 0.1 * 30 / 31)
    assert set(short.tolist()) == set(range(2, 32)) and abs(short.mean() - 16.5) < 5 * 9 / len(short) ** 0.5
    # The shortest of all: half of the short ones are no shorter.
    smallest = draw(make_corpus([[1] * 20_000] * 2), 6)
    lengths_of_three = smallest.lengths[smallest.random == 0] - 3
    assert set(lengths_of_three.tolist()) == {2, 3}
    assert near(int((lengths_of_three == 2).sum()), len(lengths_of_three), 0.1 / 2)
    # A ends anywhere inside.
    cuts = (pairs.a_end - pairs.a_begin)[pairs.random == 0][lengths == 32]
    assert set(cuts.tolist()) == set(range(1, 32)) and abs(cuts.mean() - 16) < 5 * 9 / len(cuts) ** 0.5


def test_every_sentence_is_read_once_in_order():
    corpus = make_corpus([[1] * 1000, [1] * 777, [1]])
    pairs = draw(corpus, 24)
    ends = np.where(pairs.random == 1, pairs.a_end, pairs.b_end)
    assert pairs.a_begin.tolist() == [0, *ends[:-1].tolist()] and ends[-1] == 1778


def test_random_passages_come_from_any_place_of_any_other_document():
    corpus = make_corpus([[1] * 3000, [5] * 12, [7] * 3, [2] * 4])
    pairs = draw_pairs(corpus, np.array([0]), 16, np.random.default_rng(0))
    begins = pairs.b_begin[pairs.random == 1]
    counts = np.bincount(document_of(corpus, begins), minlength=4)
    assert counts[0] == 0 and all(near(int(n), len(begins), 1 / 3) for n in counts[1:])
    assert set(np.searchsorted(corpus.sentences, begins, side="right") - 1) == set(range(3000, 3019))
    pairs = draw_pairs(make_corpus([[1] * 300, [2] * 8]), np.array([0]), 16, np.random.default_rng(0))
    assert (pairs.b_begin[pairs.random == 1] >= 300).all()


def test_random_passages_hold_as_many_sentences_as_are_wanted():
    """The label must not show in the lengths: 13 tokens in all, of sentences of one, where the document has them."""
    corpus = make_corpus([[1] * 5000] * 3)
    pairs = draw(corpus, 16)
    for random in (0, 1):
        mine = pairs.random == random
        assert 0.85 < (pairs.lengths[mine] == 16).mean() < 0.95
    ends = document_of(corpus, pairs.b_end[pairs.random == 1] - 1)
    assert (ends == document_of(corpus, pairs.b_begin[pairs.random == 1])).all()


def test_a_sentence_alone_has_a_random_second():
    pairs = draw(make_corpus([[9]] * 50), 64)
    assert len(pairs.random) == 50 and pairs.random.all() and (pairs.lengths == 21).all()


def test_sentences_longer_than_any_example_are_read_in_pieces():
    """As a paragraph a line would be: next to nothing is lost, and labels have no lengths of their own."""
    corpus = make_corpus([[20_000], [30_000, 5, 40_000]])
    pairs = draw(corpus, 128)
    seen = np.zeros(corpus.sentences[-1], dtype=bool)
    for begin, end in [*zip(pairs.a_begin, pairs.a_end, strict=True), *zip(pairs.b_begin, pairs.b_end, strict=True)]:
        seen[begin:end] = True
    # What is over the end is cut, as with any sentences: half a piece of nine.
    assert seen.mean() > 0.85 and near(int(pairs.random.sum()), len(pairs.random), 0.5)
    full = [(pairs.lengths[pairs.random == random] == 128).mean() for random in (0, 1)]
    assert min(full) > 0.85 and abs(full[0] - full[1]) < 0.08
    # Random passages begin in any piece, not only at the beginning of the line.
    begins = pairs.b_begin[(pairs.random == 1) & (pairs.a_begin >= 20_000)]
    assert (np.diff(np.sort(begins)) < 2000).all() and begins.max() > 19_000


@pytest.mark.parametrize("max_length", [SHORTEST, 6, 17, 64])
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=2, max_size=6), st.integers(0, 2**32))
def test_whatever_the_sentences(max_length, documents, seed):
    corpus = make_corpus(documents)
    pairs = draw(corpus, max_length, seed)
    assert len(pairs.random) >= len(documents) and pairs.lengths.max() <= max_length
    assert (pairs.a_end > pairs.a_begin).all() and (pairs.b_end > pairs.b_begin).all()
    first, second = document_of(corpus, pairs.a_begin), document_of(corpus, pairs.b_begin)
    assert ((first == second) == (pairs.random == 0)).all()
    assert (first == document_of(corpus, pairs.a_end - 1)).all()
    assert (second == document_of(corpus, pairs.b_end - 1)).all()
    assert set(first) == set(range(len(documents)))


def cut(a: int, b: int, most: int) -> tuple[int, int]:
    """BERT's truncate_seq_pair, of lengths."""
    while a + b > most:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    return a, b


@pytest.mark.parametrize("most", [2, 3, 10, 31])
def test_pairs_are_cut_as_bert_cuts_them(most):
    """Two sentences that fit one by one, but not together."""
    documents = [[a, b] for a in range(1, most + 1) for b in range(1, most + 1)]
    corpus = make_corpus(documents)
    checked, fronts, backs = 0, 0, 0
    for seed in range(8):
        pairs = draw(corpus, most + 3, seed)
        places = document_of(corpus, pairs.a_begin)
        for i in np.flatnonzero(pairs.random == 0).tolist():
            a, b = documents[places[i]]
            got = (pairs.a_end[i] - pairs.a_begin[i], pairs.b_end[i] - pairs.b_begin[i])
            assert got == cut(a, b, most)
            middle = corpus.sentences[2 * places[i] + 1]
            assert middle - a <= pairs.a_begin[i] <= pairs.a_end[i] <= middle <= pairs.b_begin[i]
            fronts += int(pairs.a_begin[i] - (middle - a) + pairs.b_begin[i] - middle)
            backs += int(middle - pairs.a_end[i] + middle + b - pairs.b_end[i])
            checked += 1
    assert checked > len(documents) and near(fronts, fronts + backs, 0.5)


def test_the_generator_decides():
    corpus = ordinary(np.random.default_rng(1), 30)
    one, same, other = (draw(corpus, 64, seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert len(one.random) != len(other.random) or any((a != b).any() for a, b in zip(one, other, strict=True))
