"""The benchmarks' own parts: workloads that are what they say, and a README that says what was measured."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
from benchmarks import encoder, table
from benchmarks.workloads import Workload, encoder_workloads, ragged_lengths

README = Path(table.README).read_text()


@pytest.mark.parametrize(("sequences", "longest", "fill"), [(32, 128, 0.42), (16, 512, 0.4), (8, 64, 0.9)])
def test_ragged_lengths_have_the_fill_they_promise(sequences, longest, fill):
    lengths = ragged_lengths(sequences, longest, fill)
    assert len(lengths) == sequences and max(lengths) == longest and min(lengths) >= 1
    assert abs(sum(lengths) / (sequences * longest) - fill) < 0.01
    assert lengths == ragged_lengths(sequences, longest, fill)


def test_a_batch_is_its_lengths():
    batch = Workload("some", "bert-base", (3, 1, 5)).batch()
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 5]
    assert batch["input_ids"].shape == (3, 5) and (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_real_sentences_are_real():
    workload = encoder_workloads()[-1]
    batch = workload.batch()
    for ids, row, length in zip(workload.ids, batch["input_ids"], workload.lengths, strict=True):
        assert row[:length].tolist() == list(ids) and ids[0] == 101 and ids[-1] == 102


def test_every_goal_belongs_to_a_workload():
    names = {w.name for w in encoder_workloads()}
    assert {name for name, _ in encoder.GOALS} <= names == set(table.WHAT)


def test_the_readme_shows_the_committed_results_and_no_others():
    assert table.placed(README, table.render(table.newest())) == README


def test_results_in_the_readme_say_where_they_are_from():
    for line in table.newest().values():
        environment = line["environment"]
        assert environment["commit"] and not environment["commit"].endswith("dirty") and environment["threads"]
        assert line["milliseconds"]["stock"]["n"] >= encoder.LEAST_ROUNDS
