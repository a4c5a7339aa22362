"""The proof that training learns: that what models are asked about was in no text that they were trained on."""

import random

import pytest

from benchmarks import learning
from bertfast import texts


@pytest.fixture(autouse=True)
def few_modules(monkeypatch):
    modules = ("shutil", "turtle", "typing", "logging/__init__", "unittest/mock", "ipaddress", "tarfile")
    monkeypatch.setattr(texts, "library", lambda: modules)
    monkeypatch.setattr(learning, "PACKAGES", 4)
    monkeypatch.setattr(learning, "ROWS", 20)


def test_what_is_asked_about_was_not_seen_before():
    documents, training, asked = learning.divide(random.Random(0))
    seen = {sentence for document in documents for sentence in document}
    kinds = [{row.text for row in rows} for rows in (training, asked)]
    assert [len(kind) for kind in kinds] == [80, 80] and len(seen) > 2000
    assert not kinds[0] & kinds[1] and not seen & (kinds[0] | kinds[1])
    assert len({row.package for row in asked}) == 4 and {row.package for row in asked} == {
        row.package for row in training
    }
    assert not any(sentence in learning.PHRASES for sentence in seen)


def test_claims_are_counted(capsys):
    claims = learning.Claims()
    claims.check(True, "one")
    claims.check(False, "two")
    assert claims.failed == 1 and capsys.readouterr().out.split() == ["yes", "one", "NO", "two"]
    assert learning.plain_words("The file's names (and a_name.txt) are Read.") == ["names", "read"]


def test_every_other_sentence_is_shuffled():
    rows = [learning.Held(f"one two three {i}", "package") for i in range(6)]
    made = learning.every_other_shuffled(rows, random.Random(0))
    assert [label for _, label in made] == ["written", "shuffled"] * 3
    for row, (text, label) in zip(rows, made, strict=True):
        assert (text == row.text) is (label == "written") and sorted(text.split()) == sorted(row.text.split())
