"""Batches to pre-train on: pairs of a corpus, masked and packed, the same for the same seed, epoch and step.

An epoch reads the documents in random order, a block of them at a time. A block's examples are planned at once (where
their segments lie, 2 to 3 µs each), shuffled, and divided into batches; only then, in the workers, are tokens looked
at. Every block has a random generator of its own, and so has every batch's masking: to begin anywhere, the blocks
before are planned, for their numbers of batches, and nothing else. The generators are numpy's, whose draws another
version of numpy may change.
"""

import heapq
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bertfast.packing import PackedBatch, Packing
from bertfast.train.corpus import Corpus
from bertfast.train.masking import Masking, expand
from bertfast.train.pairs import SHORTEST, Pairs, draw_pairs
from bertfast.train.vocabulary import Vocabulary

_BLOCK_TOKENS = 1 << 23  # of the texts: enough documents to mix, and tens of megabytes of plans
_BLOCK_BATCHES = 64  # at least about as many, so that few are not full
_ORDER, _PLAN, _MASKS = range(3)  # what a generator is for


class PretrainingExamples(NamedTuple):
    """What one process computes of a step.

    batch: this process's sequences, with token types and the labels of masked tokens. next_sentence_labels:
    (sequences,) int64, 0 where the second segment follows the first, 1 where it is of another document. labelled,
    sequences: how many masked tokens and sequences all processes have together, for means over all of them.
    """

    batch: PackedBatch
    next_sentence_labels: Tensor
    labelled: int
    sequences: int


class _Draft(NamedTuple):
    """A batch of all processes before it is made: its examples, and the generator of its masks."""

    pairs: Pairs
    epoch: int
    step: int


class PretrainingBatches:
    """The batches of one process among `world_size`.

    tokens_per_batch: the most tokens of a batch, of all processes together. It is divided into whole sequences with
    about as many tokens for each, so that the sequences of a step do not depend on world_size; where it has fewer
    sequences than there are processes, some get none. max_length: of a sequence. masking: "whole-word" or "token".
    workers: processes that make batches ahead of time; 0 makes them in this one. The batches are the same for any
    number.

    Raises ValueError where the sizes do not fit one another, and where the corpus was made with another vocabulary.
    """

    def __init__(
        self,
        corpus: Corpus,
        vocabulary: Vocabulary,
        *,
        tokens_per_batch: int,
        max_length: int,
        seed: int,
        masking: str = "whole-word",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        if corpus.fingerprint != vocabulary.fingerprint:
            raise ValueError(f"{corpus.directory} was made with another vocabulary: open the texts with this one")
        for name, value in (("seed", seed), ("workers", workers)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, and is {value}")
        if max_length < SHORTEST:
            raise ValueError(f"a max_length of {max_length} has no room for two segments: give {SHORTEST} or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"there is no rank {rank} among {world_size} processes")
        if tokens_per_batch < max_length * world_size:
            raise ValueError(
                f"{tokens_per_batch} tokens a batch are less than a sequence of {max_length} tokens for each of "
                f"{world_size} processes: give more tokens a batch or a smaller max_length"
            )
        self.corpus, self.tokens_per_batch, self.max_length = corpus, tokens_per_batch, max_length
        self.seed, self.workers = seed, workers
        self._examples = _Examples(corpus, vocabulary, masking, seed, rank, world_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PretrainingExamples]:
        """The batches of an epoch, from number `start` on. Raises ValueError where it has fewer than that."""
        loader = DataLoader(
            self._examples,
            batch_size=None,
            sampler=self._drafts(epoch, start),
            num_workers=self.workers,
            generator=torch.Generator(),  # or it would draw from the one that dropout draws from
            worker_init_fn=_ignore_interrupts,
        )
        yield from loader

    def steps(self, epoch: int) -> int:
        """How many batches an epoch has. It is planned for that, which takes about 3 s a million examples."""
        return sum(len(self._divide(self._plan(epoch, i, block))) for i, block in enumerate(self._blocks(epoch)))

    def _drafts(self, epoch: int, start: int) -> Iterator[_Draft]:
        step = 0
        for i, block in enumerate(self._blocks(epoch)):
            pairs = self._plan(epoch, i, block)
            for batch in self._divide(pairs):
                if step >= start:
                    yield _Draft(pairs.take(batch), epoch, step)
                step += 1
        if step < start:
            raise ValueError(f"epoch {epoch} has {step} batches, and cannot begin at number {start}")

    def _blocks(self, epoch: int) -> list[np.ndarray]:
        """The documents in this epoch's order, in blocks of about as many tokens each."""
        borders = self.corpus.sentences[self.corpus.documents]
        order = _generator(self.seed, epoch, _ORDER).permutation(len(borders) - 1)
        behind = np.cumsum(np.diff(borders)[order])
        size = max(_BLOCK_TOKENS, _BLOCK_BATCHES * self.tokens_per_batch)
        count = max(1, round(int(behind[-1]) / size))
        cuts = np.searchsorted(behind, np.arange(1, count) * (behind[-1] / count))
        return [block for block in np.split(order, cuts) if len(block)]

    def _plan(self, epoch: int, number: int, documents: np.ndarray) -> Pairs:
        """A block's examples, shuffled."""
        rng = _generator(self.seed, epoch, _PLAN, number)
        pairs = draw_pairs(self.corpus, documents, self.max_length, rng)
        return pairs.take(rng.permutation(len(pairs.random)))

    def _divide(self, pairs: Pairs) -> list[slice]:
        """The batches: runs of examples, as few as can be, and among those as even as can be."""
        behind = np.cumsum(pairs.lengths)
        count = len(_cut(behind, self.tokens_per_batch))
        least, most = max(self.max_length, int(behind[-1]) // count), self.tokens_per_batch
        while least < most:
            middle = (least + most) // 2
            if len(_cut(behind, middle)) > count:
                least = middle + 1
            else:
                most = middle
        return _cut(behind, most)


def _cut(behind: np.ndarray, most: int) -> list[slice]:
    """Runs of at most `most` tokens, each as long as can be. behind: tokens up to each example, itself included."""
    runs, begin, done = [], 0, 0
    while begin < len(behind):
        end = int(np.searchsorted(behind, done + most, side="right"))
        runs.append(slice(begin, end))
        begin, done = end, int(behind[end - 1])
    return runs


class _Examples(Dataset):
    """Makes batches of drafts: what the workers do."""

    def __init__(
        self, corpus: Corpus, vocabulary: Vocabulary, masking: str, seed: int, rank: int, world_size: int
    ) -> None:
        self._corpus, self._masking = corpus, Masking.of(vocabulary, masking)
        self._start, self._separator = ([i] for i in (vocabulary.start_id, vocabulary.separator_id))
        self._seed, self._rank, self._world_size = seed, rank, world_size

    def __getitem__(self, draft: _Draft) -> PretrainingExamples:
        """All processes' batch is made in each, for its number of labels; then all but this one's part goes."""
        pairs, lengths = draft.pairs, draft.pairs.lengths
        rng = _generator(self._seed, draft.epoch, _MASKS, draft.step)
        ids, labels = self._masking.apply(self._gather(pairs), lengths, rng)
        labelled, sequences = int((labels >= 0).sum()), len(lengths)
        if self._world_size > 1:
            mine = share(lengths, self._world_size)[self._rank]
            places = expand((np.cumsum(lengths) - lengths)[mine], lengths[mine])
            pairs, lengths, ids, labels = pairs.take(mine), lengths[mine], ids[places], labels[places]
        firsts = pairs.a_end - pairs.a_begin + 2  # [CLS] A [SEP]
        types = np.repeat(np.tile([0, 1], len(lengths)), np.stack((firsts, lengths - firsts), 1).ravel())
        batch = PackedBatch(
            torch.from_numpy(ids),
            torch.from_numpy(expand(np.zeros_like(lengths), lengths)),
            Packing.from_lengths(lengths.tolist()),
            torch.from_numpy(types),
            torch.from_numpy(labels),
            token_labels=True,
        )
        return PretrainingExamples(batch, torch.from_numpy(pairs.random), labelled, sequences)

    def _gather(self, pairs: Pairs) -> np.ndarray:
        """[CLS] A [SEP] B [SEP] of all examples behind one another, (tokens,) int64."""
        tokens = np.asarray(self._corpus.tokens)
        parts: list[Sequence[int] | np.ndarray] = []
        for a_begin, a_end, b_begin, b_end in zip(*(column.tolist() for column in pairs[:4]), strict=True):
            parts += (self._start, tokens[a_begin:a_end], self._separator, tokens[b_begin:b_end], self._separator)
        return np.concatenate(parts, dtype=np.int64)


def share(lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """The places of each process's sequences: the longest first, each to whoever has the fewest tokens by then."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, i) for i in range(count)]
    for place in np.argsort(-lengths, kind="stable").tolist():
        load, i = loads[0]
        shares[i].append(place)
        heapq.heapreplace(loads, (load + int(lengths[place]), i))
    return [np.array(sorted(places), dtype=np.int64) for places in shares]


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C goes to all processes, and the training still wants the batches of the step that it is in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))
