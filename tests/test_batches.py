"""Batches: what is in them, and that they are the same for any number of processes and workers and from any step."""

import multiprocessing
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pretraining_texts
import pytest
import torch

from bertfast.packing import Packing
from bertfast.train import batches as module
from bertfast.train.batches import PretrainingBatches, PretrainingExamples, share
from bertfast.train.corpus import Corpus, open_corpus
from bertfast.train.vocabulary import Vocabulary

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, TOKENS = 64, 1024


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def vocabulary(place: Path) -> Vocabulary:
    return Vocabulary.train([pretraining_texts.write(place / "a.txt", pretraining_texts.documents())], 1500)


@pytest.fixture(scope="module")
def corpus(place: Path, vocabulary: Vocabulary) -> Corpus:
    return open_corpus([place / "a.txt"], vocabulary, place / "cache")


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an epoch of a large corpus has them."""
    monkeypatch.setattr(module, "_BLOCK_TOKENS", 8000)
    monkeypatch.setattr(module, "_BLOCK_BATCHES", 1)


@pytest.fixture
def make(corpus: Corpus, vocabulary: Vocabulary) -> Any:
    def build(**changes: Any) -> PretrainingBatches:
        options = {"tokens_per_batch": TOKENS, "max_length": LENGTH, "seed": 3}
        return PretrainingBatches(corpus, vocabulary, **{**options, **changes})

    return build


def tensors(examples: PretrainingExamples) -> list[torch.Tensor]:
    batch = examples.batch
    found = [batch.input_ids, batch.position_ids, batch.token_type_ids, batch.labels, batch.packing.cu_seqlens]
    return [*found, examples.next_sentence_labels, torch.tensor([examples.labelled, examples.sequences])]


def same(one: list[PretrainingExamples], other: list[PretrainingExamples]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(tensors(x), tensors(y), strict=True)
    )


def sequences(examples: PretrainingExamples) -> list[tuple]:
    """The ids, types, labels and next-sentence label of each sequence."""
    batch = examples.batch
    columns = [t.split(batch.packing.lengths) for t in (batch.input_ids, batch.token_type_ids, batch.labels)]
    rows = zip(*columns, examples.next_sentence_labels, strict=True)
    return [tuple(tuple(t.reshape(-1).tolist()) for t in row) for row in rows]


def test_what_a_batch_is(make, corpus, vocabulary):
    texts = [
        corpus.tokens[corpus.sentences[begin] : corpus.sentences[end]].astype(">u2").tobytes()
        for begin, end in zip(corpus.documents[:-1], corpus.documents[1:], strict=True)
    ]

    def homes(ids: list[int]) -> set[int]:
        part = np.array(ids, dtype=">u2").tobytes()
        return {i for i, text in enumerate(texts) if part in text}

    checked = 0
    for examples in list(make().epoch(0))[:6]:
        batch, packing = examples.batch, examples.batch.packing
        expected = Packing.from_lengths(packing.lengths)
        assert torch.equal(packing.cu_seqlens, expected.cu_seqlens) and packing.max_seqlen <= LENGTH
        assert torch.equal(batch.position_ids, expected.position_ids()) and batch.token_labels
        assert all(t.dtype == torch.int64 for t in tensors(examples) if t is not packing.cu_seqlens)
        assert batch.input_ids.numel() == packing.tokens <= TOKENS
        assert examples.labelled == int((batch.labels != -100).sum())
        assert examples.sequences == len(packing.lengths) == len(examples.next_sentence_labels)
        for ids, types, labels, (random,) in sequences(examples):
            original = [i if label == -100 else label for i, label in zip(ids, labels, strict=True)]
            assert original[0] == vocabulary.start_id and original[-1] == vocabulary.separator_id
            middle = original.index(vocabulary.separator_id)
            a, b = original[1:middle], original[middle + 1 : -1]
            assert a and b and not vocabulary.special[b].any()
            assert types == (0,) * (middle + 1) + (1,) * (len(b) + 1)
            if len(a) > 4 and len(b) > 4:  # shorter ones may be anywhere
                assert homes(a) and homes(b) and bool(homes(a) & homes(b)) is (random == 0)
                checked += 1
    assert checked > 50


def test_batches_are_full_and_even(make):
    sizes = [e.batch.packing.tokens for e in make().epoch(0)]
    assert max(sizes) <= TOKENS and np.mean(sizes) > 0.9 * TOKENS and min(sizes) > 0.75 * TOKENS


def test_an_epoch_is_all_documents_once(make, corpus):
    batches = make()
    blocks = batches._blocks(0)
    assert len(blocks) > 3
    assert sorted(np.concatenate(blocks).tolist()) == list(range(len(corpus.documents) - 1))
    sizes = [sum(int(np.diff(corpus.sentences[corpus.documents[[d, d + 1]]])[0]) for d in block) for block in blocks]
    assert max(sizes) < 1.5 * min(sizes)
    count = sum(len(batches._plan(0, i, block).random) for i, block in enumerate(blocks))
    assert sum(e.sequences for e in batches.epoch(0)) == count


def test_every_draw_is_its_own(make, corpus):
    """Of each epoch the order and the pairs, of each block the pairs, of each batch the masks."""
    batches = make()
    blocks, later = batches._blocks(0), batches._blocks(1)
    assert blocks[0].tolist() != later[0].tolist()
    plans = [batches._plan(epoch, i, blocks[0]) for epoch, i in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(sorted(plan.a_end.tolist())) for plan in plans}) == 3
    draft = next(batches._drafts(0, 0))
    made = [batches._examples[d] for d in (draft, draft._replace(step=1), draft._replace(epoch=1))]
    assert len({tuple(e.batch.labels.tolist()) for e in made}) == 3
    documents = np.searchsorted(corpus.sentences[corpus.documents], draft.pairs.a_begin, side="right")
    assert np.mean(documents[1:] == documents[:-1]) < 0.3


@pytest.mark.parametrize("masking", ["whole-word", "token"])
def test_the_same_seed_gives_the_same(make, masking):
    one = list(make(masking=masking).epoch(2))
    assert same(one, list(make(masking=masking).epoch(2))) and len(one) == make().steps(2)
    for changes, epoch in (({}, 3), ({"seed": 4}, 2)):
        other = list(make(masking=masking, **changes).epoch(epoch))
        found, again = ({s for e in batches for s in sequences(e)} for batches in (one, other))
        assert len(found & again) < 0.02 * len(found)


def test_the_kind_of_masking_counts(make, vocabulary):
    continues = torch.from_numpy(vocabulary.continues)
    for masking in ("whole-word", "token"):
        broken = 0
        for e in make(masking=masking).epoch(0):
            labels = e.batch.labels
            original = torch.where(labels == -100, e.batch.input_ids, labels)
            inside = continues[original[1:]] & ~torch.from_numpy(vocabulary.special)[original[:-1]]
            broken += int((inside & ((labels[1:] == -100) != (labels[:-1] == -100))).sum())
        assert (broken == 0) is (masking == "whole-word")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(make, workers):
    state = torch.get_rng_state()
    assert same(list(make().epoch(0)), list(make(workers=workers).epoch(0)))
    assert torch.equal(state, torch.get_rng_state())  # dropout draws from it


def test_an_interrupt_leaves_workers_alone(make):
    batches = make(workers=1).epoch(0)
    found = [next(batches)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert same(found + list(batches), list(make().epoch(0)))


def test_what_workers_need_is_small(make):
    examples = make()._examples
    data = pickle.dumps(examples)
    assert len(data) < 50_000
    draft = next(make()._drafts(0, 0))
    assert same([pickle.loads(data)[draft]], [examples[draft]])


def test_an_epoch_may_begin_anywhere(make, monkeypatch):
    whole = list(make().epoch(1))
    for start in (1, 7, len(whole) // 2, len(whole) - 1, len(whole)):
        assert same(list(make().epoch(1, start)), whole[start:])
    assert same(list(make(workers=1).epoch(1, 11)), whole[11:])
    with pytest.raises(ValueError, match=f"epoch 1 has {len(whole)} batches, and cannot begin at number"):
        list(make().epoch(1, len(whole) + 1))


def test_beginning_late_looks_at_no_tokens_before(make, monkeypatch):
    batches, made = make(), []
    gather = type(batches._examples)._gather
    monkeypatch.setattr(type(batches._examples), "_gather", lambda self, pairs: made.append(1) or gather(self, pairs))
    assert len(list(batches.epoch(0, 12))) == len(made) == batches.steps(0) - 12


@pytest.mark.parametrize("count", [2, 3, 16])
def test_processes_divide_each_batch(make, count):
    whole = list(make().epoch(0))
    parts = [list(make(rank=rank, world_size=count).epoch(0)) for rank in range(count)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        mine = [part[step] for part in parts]
        assert sorted(s for e in mine for s in sequences(e)) == sorted(sequences(batch))
        assert {(e.labelled, e.sequences) for e in mine} == {(batch.labelled, batch.sequences)}
        assert sum(int((e.batch.labels != -100).sum()) for e in mine) == batch.labelled
        sizes = [e.batch.packing.tokens for e in mine]
        assert max(sizes) - min(sizes) <= LENGTH
        assert all(torch.equal(e.batch.position_ids, e.batch.packing.position_ids()) for e in mine)


def test_a_process_may_have_nothing(make, monkeypatch):
    monkeypatch.setattr(module, "share", lambda lengths, count: share(lengths[:0], count))
    examples = next(make(world_size=2).epoch(0))
    assert examples.batch.input_ids.numel() == 0 == len(examples.next_sentence_labels)
    assert examples.batch.packing.lengths == () and examples.labelled > 0


def test_shares():
    lengths = np.array([5, 9, 2, 9, 1])
    assert [places.tolist() for places in share(lengths, 2)] == [[0, 1], [2, 3, 4]]
    assert [places.tolist() for places in share(lengths[:1], 3)] == [[0], [], []]


def test_a_corpus_smaller_than_a_batch(make, monkeypatch):
    monkeypatch.undo()  # one block
    [examples] = make(tokens_per_batch=1 << 20).epoch(0)
    assert examples.sequences > 300 and make(tokens_per_batch=1 << 20).steps(0) == 1


def test_options_that_will_not_do(make, corpus, place):
    other = Vocabulary.train([place / "a.txt"], 600)
    with pytest.raises(ValueError, match="was made with another vocabulary"):
        PretrainingBatches(corpus, other, tokens_per_batch=TOKENS, max_length=LENGTH, seed=0)
    for changes, message in (
        ({"max_length": 4}, "a max_length of 4 has no room for two segments: give 5 or more"),
        ({"rank": 2, "world_size": 2}, "no rank 2 among 2"),
        ({"rank": -1}, "no rank -1"),
        (
            {"tokens_per_batch": 127, "world_size": 2},
            "127 tokens a batch are less than a sequence of 64 .* 2 processes",
        ),
        ({"masking": "span"}, "masking must be"),
        ({"workers": -1}, "workers must not be negative"),
        ({"seed": -1}, "seed must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changes)
