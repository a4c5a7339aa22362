"""Masks: their statistics on many tokens, and what holds of every sequence."""

from dataclasses import fields
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertfast.train.masking import Masking

SIZE, SPECIALS, MASK = 500, 5, 4
SPECIAL = np.arange(SIZE) < SPECIALS
CONTINUES = np.arange(SIZE) % 3 == 0  # a third of the ids continue a word
CONTINUES[:SPECIALS] = False


def masking(whole_words: bool) -> Masking:
    return Masking(SPECIAL, CONTINUES, np.flatnonzero(~SPECIAL), MASK, whole_words)


def draw(sequences: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] words [SEP] words [SEP] of random lengths, and those."""
    lengths = rng.integers(20, 200, sequences)
    ids = rng.integers(SPECIALS, SIZE, lengths.sum())
    ends = np.cumsum(lengths)
    ids[ends - lengths], ids[ends - 1], ids[ends - lengths // 2] = 2, 3, 3
    return ids, lengths


def words(ids: np.ndarray, whole_words: bool) -> list[list[int]]:
    """The places of each word, one after the other: the slow way."""
    found: list[list[int]] = []
    for place, i in enumerate(ids.tolist()):
        if SPECIAL[i]:
            continue
        if whole_words and CONTINUES[i] and place and not SPECIAL[ids[place - 1]]:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def near(count: int, of: int, share: float) -> bool:
    """Whether a binomial count is within 5 standard deviations."""
    return abs(count - of * share) < 5 * (of * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("whole_words", [True, False])
def test_statistics(whole_words):
    rng = np.random.default_rng(0)
    ids, lengths = draw(3000, rng)
    seen, labels = masking(whole_words).apply(ids, lengths, rng)
    chosen, ordinary = labels != -100, ~SPECIAL[ids]
    assert ordinary.sum() > 300_000 and not chosen[~ordinary].any()
    assert (labels[chosen] == ids[chosen]).all() and (seen[~chosen] == ids[~chosen]).all()
    assert abs(chosen.sum() / ordinary.sum() - 0.15) < (0.001 if not whole_words else 0.003)
    number = int(chosen.sum())
    replaced = chosen & (seen != MASK) & (seen != ids)
    assert near(int((seen[chosen] == MASK).sum()), number, 0.8)
    # A random token is the same one again once in 495 times.
    assert near(int(replaced.sum()), number, 0.1 * (1 - 1 / (SIZE - SPECIALS)))
    assert near(int((seen == ids)[chosen].sum()), number, 0.1 * (1 + 1 / (SIZE - SPECIALS)))
    counts = np.bincount(seen[replaced], minlength=SIZE)
    assert not counts[:SPECIALS].any() and counts[SPECIALS:].min() > 0
    each = replaced.sum() / (SIZE - SPECIALS)
    assert (np.abs(counts[SPECIALS:] - each) < 6 * each**0.5).all()


def test_every_place_is_as_likely():
    rng = np.random.default_rng(1)
    lengths = np.full(8000, 22)
    ids = np.tile([2, *range(7, 7 + 60, 3), 3], 8000)
    _, labels = masking(True).apply(ids, lengths, rng)
    counts = (labels != -100).reshape(8000, 22).sum(0)
    assert counts[0] == counts[-1] == 0 and all(near(int(n), 8000, 3 / 20) for n in counts[1:-1])


sequences = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=40), max_size=6)


@pytest.mark.parametrize("whole_words", [True, False])
@settings(max_examples=80, deadline=None)
@given(sequences, st.integers(0, 2**32))
def test_every_sequence(whole_words, lists, seed):
    """Whole words, as many as fit, none that could have been added, and one at least."""
    ids, lengths = np.array([*chain(*lists)], dtype=np.int64), np.array([len(row) for row in lists], dtype=np.int64)
    seen, labels = masking(whole_words).apply(ids, lengths, np.random.default_rng(seed))
    assert seen.dtype == labels.dtype == np.int64
    again = masking(whole_words).apply(ids, lengths, np.random.default_rng(seed))
    assert (seen == again[0]).all() and (labels == again[1]).all()
    ends = np.cumsum(lengths)
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        chosen = labels[end - length : end] != -100
        found = words(ids[end - length : end], whole_words)
        if not found:
            assert not chosen.any()
            continue
        budget = max(1, round(0.15 * sum(map(len, found))))
        left = budget - chosen.sum()
        taken = [bool(chosen[word].all()) for word in found]
        assert chosen.sum() == sum(len(word) for word, t in zip(found, taken, strict=True) if t)
        if left < 0:  # no word fits: one of the shortest
            assert sum(taken) == 1 and chosen.sum() == min(map(len, found))
        else:
            assert chosen.any() and all(t or len(word) > left for word, t in zip(found, taken, strict=True))


def test_words_are_chosen_in_random_order_not_by_size():
    """Long words are chosen as often as short ones, but where they no longer fit."""
    rng = np.random.default_rng(2)
    word = [7, 9, 12]  # three pieces
    ids = np.tile([2, *([*word, 8, 10] * 20), 3], 2000)
    _, labels = masking(True).apply(ids, np.full(2000, 102), rng)
    chosen = (labels != -100).reshape(2000, 102)[:, 1:-1].reshape(-1, 5)
    assert (chosen[:, 0] == chosen[:, 1]).all() and (chosen[:, 0] == chosen[:, 2]).all()
    assert chosen.sum() == 2000 * 15
    assert 0.75 < chosen[:, 0].sum() / chosen[:, 3].sum() < 1


def test_another_generator_masks_other_words():
    ids, lengths = draw(20, np.random.default_rng(3))
    one, other = (masking(True).apply(ids, lengths, np.random.default_rng(seed))[1] for seed in (0, 1))
    assert (one != other).any()


def test_what_it_takes_of_a_vocabulary():
    vocabulary = SimpleNamespace(special=SPECIAL, continues=CONTINUES, mask_id=MASK)
    for kind, whole_words in (("whole-word", True), ("token", False)):
        made, expected = Masking.of(vocabulary, kind), masking(whole_words)
        assert all(np.array_equal(getattr(made, f.name), getattr(expected, f.name)) for f in fields(Masking))


def test_kinds():
    with pytest.raises(ValueError, match="masking must be 'whole-word' or 'token', not 'word'"):
        Masking.of(None, "word")
