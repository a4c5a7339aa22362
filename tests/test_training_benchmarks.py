"""The benchmarks of training that are not the harness's: what it keeps in memory, and epochs of fine-tuning."""

import json

import pytest

pytest.importorskip("transformers")

from benchmarks import epochs, memory
from benchmarks.results import Writer
from benchmarks.workloads import MINILM_PACKAGE, Workload

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["peer"], r["precision"]): r for r in lines if r["record"] == "measurement"}


def test_memory(tmp_path):
    case = memory.Case(Workload("pretrain 4x16", (16,) * 4, training=True), "pretraining", 0.45, "tiny")
    memory.measure(Writer(tmp_path / "lines.jsonl"), case)
    found = measured(tmp_path / "lines.jsonl")
    assert len(found) == 4
    for precision in memory.PRECISIONS:
        stock, ours = found["hf-sdpa", precision], found["bertfast", precision]
        # The logits of all 64 tokens against those of 15 % of them.
        assert stock["peak_bytes"] > 64 * 30522 * 4 and ours["ratio"] < 0.6
        assert ours["ratio"] == ours["peak_bytes"] / stock["peak_bytes"]


def test_epochs(tmp_path, monkeypatch):
    pytest.importorskip(MINILM_PACKAGE)
    monkeypatch.setattr(epochs, "SENTENCES", 24)
    monkeypatch.setattr(epochs, "HELD_OUT", 8)
    monkeypatch.setattr(epochs, "BATCH", 8)
    epochs.measure(Writer(tmp_path / "lines.jsonl"), "float32", 1)
    found = measured(tmp_path / "lines.jsonl")
    stock, ours = found["hf-sdpa", "float32"], found["bertfast", "float32"]
    assert stock["tokens"] == ours["tokens"] < ours["padded"] and len(ours["seconds"]) == 1
    assert 0 <= ours["accuracy"] <= 1 and ours["speedup"]["value"] > 0


def test_both_learners_compute_the_same():
    pytest.importorskip(MINILM_PACKAGE)
    ids = list(epochs.encode(epochs.real_sentences(5)))
    labels = epochs.torch.arange(5)
    stock, patched = epochs.stock(), epochs.patched()
    theirs, ours = stock.call(ids, labels), patched.call(ids, labels)
    epochs.torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    epochs.torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
