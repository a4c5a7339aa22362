"""Which words the model is asked for, and what it sees in their place: Devlin et al. 2019, section 3.1, task 1."""

from dataclasses import dataclass

import numpy as np

from bertfast.ops.loss import IGNORED
from bertfast.train.vocabulary import Vocabulary

MASKINGS = ("whole-word", "token")
_CHOSEN = 0.15  # of the tokens of a sequence
_MASKED, _RANDOM = 0.8, 0.1  # of the chosen; the others stay as they are


@dataclass(frozen=True, eq=False)
class Masking:
    """What masking has to know of a vocabulary.

    special, continues: (vocabulary,) bool, as `Vocabulary` has them; ordinary: the ids that are not special; mask_id:
    that of [MASK]. whole_words: whether all pieces of a word are chosen together.
    """

    special: np.ndarray
    continues: np.ndarray
    ordinary: np.ndarray
    mask_id: int
    whole_words: bool

    @classmethod
    def of(cls, vocabulary: Vocabulary, kind: str) -> "Masking":
        """kind: one of MASKINGS; ValueError for another."""
        if kind not in MASKINGS:
            raise ValueError(f"masking must be {' or '.join(map(repr, MASKINGS))}, not {kind!r}")
        ordinary = np.flatnonzero(~vocabulary.special)
        return cls(vocabulary.special, vocabulary.continues, ordinary, vocabulary.mask_id, kind == "whole-word")

    def apply(self, ids: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees of sequences of these lengths, and its labels: ids (tokens,) int64 to the same, twice.

        Of each sequence max(1, round(15 %)) tokens are chosen, special ones not counted: at random one word after the
        other, if it still fits; of words that are all too long, a shortest. Labels are the chosen tokens' ids, and
        -100 elsewhere. Of a sequence of special tokens alone nothing is chosen.
        """
        chosen = self._choose(ids, lengths, rng)
        labels = np.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        seen = ids.copy()
        kind = rng.random(len(chosen))
        seen[chosen[kind < _MASKED]] = self.mask_id
        random = chosen[(kind >= _MASKED) & (kind < _MASKED + _RANDOM)]
        seen[random] = rng.choice(self.ordinary, len(random))
        return seen, labels

    def _choose(self, ids: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The places of the chosen tokens."""
        begins, sizes = self._words(ids, lengths)
        owner = np.repeat(np.arange(len(lengths)), lengths)[begins]  # the sequence of each word
        tokens = np.bincount(owner, sizes, len(lengths))
        shortest = np.full(len(lengths), len(ids))
        np.minimum.at(shortest, owner, sizes)
        left = np.maximum(np.rint(_CHOSEN * tokens).astype(np.int64), shortest)
        words = np.argsort(owner + 0.5 * rng.random(len(begins)))  # sequence by sequence, each in random order
        chosen = []
        # One word after the other, in all sequences at once: those up to the first that does not fit, then without it
        # again. What is left only shrinks, so that a word that once did not fit never will.
        while len(words := words[sizes[words] <= left[owner[words]]]):
            size, sequence = sizes[words], owner[words]
            before = np.cumsum(size) - size
            filled = before - before[np.searchsorted(sequence, sequence)] + size
            fits = filled <= left[sequence]
            chosen.append(words[fits])
            left -= np.bincount(sequence[fits], size[fits], len(left)).astype(np.int64)
            words = words[~fits]
        words = np.concatenate([np.zeros(0, dtype=np.int64), *chosen])
        return expand(begins[words], sizes[words])

    def _words(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each word begins, and how many tokens it has; without whole words, every token is one."""
        ordinary = ~self.special[ids]
        starts = ordinary.copy()
        if self.whole_words:
            inside = self.continues[ids]
            inside[1:] &= ordinary[:-1]
            inside[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
            starts &= ~inside
        return np.flatnonzero(starts), np.bincount((np.cumsum(starts) - 1)[ordinary])


def expand(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """begin, begin + 1, ..., begin + size - 1 of each, behind one another."""
    return np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
