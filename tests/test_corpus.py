"""The tokenised corpus: what the tokenizer says, on disk; made once, made anew when it has to be."""

import json
import os
import pickle
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pretraining_texts
import pytest

from bertfast.errors import DataError
from bertfast.train import sources
from bertfast.train.corpus import Corpus, open_corpus
from bertfast.train.vocabulary import SPECIAL_TOKENS, Vocabulary

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretraining_texts.write(tmp_path_factory.mktemp("texts") / "a.txt", pretraining_texts.documents())


@pytest.fixture(scope="module")
def vocabulary(text: Path) -> Vocabulary:
    return Vocabulary.train([text], 800)


def unpack(corpus: Corpus) -> list[list[list[int]]]:
    """The ids of each sentence of each document."""
    tokens, sentences, documents = (a.tolist() for a in (corpus.tokens, corpus.sentences, corpus.documents))
    return [[tokens[sentences[i] : sentences[i + 1]] for i in range(begin, end)] for begin, end in pairwise(documents)]


def encode(vocabulary: Vocabulary, documents: list[list[str]]) -> list[list[list[int]]]:
    return [[vocabulary.tokenizer.encode(s, add_special_tokens=False).ids for s in d] for d in documents]


@pytest.mark.parametrize("batch", [1_000_000, 500])
def test_it_holds_what_the_tokenizer_says(text, vocabulary, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(sources, "_BATCH", batch)
    corpus = open_corpus([text], vocabulary, tmp_path)
    assert unpack(corpus) == encode(vocabulary, pretraining_texts.documents())
    assert all(isinstance(a, np.memmap) for a in (corpus.tokens, corpus.sentences, corpus.documents))
    assert corpus.tokens.dtype == np.uint16 and corpus.fingerprint == vocabulary.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == [corpus.directory.name]


def test_documents_end_with_blank_lines_and_files(vocabulary, tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    # A line of a control character is no blank line, and no sentence.
    one.write_bytes(b"\xef\xbb\xbf\n\n  \t\nthe first\r\nsentences\x00\r\n\x01\r\n here\r\n\r\n\r\n\nthe second\n")
    two.write_text("the third")
    corpus = open_corpus([one, two], vocabulary, tmp_path / "cache")
    expected = [["the first", "sentences", "here"], ["the second"], ["the third"]]
    assert unpack(corpus) == encode(vocabulary, expected)


def test_special_tokens_in_a_text_are_text(vocabulary, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("write [MASK] and [SEP]\n\nthe end\n")
    tokens = open_corpus([path], vocabulary, tmp_path).tokens
    assert not vocabulary.special[tokens].any()
    assert vocabulary.tokenizer.decode(tokens.tolist()).startswith("write [ mask ] and [ sep ]")


def test_large_vocabularies_take_four_bytes(tmp_path):
    words = [f"w{i}" for i in range(1 << 16)]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]))
    (tmp_path / "a.txt").write_text("w1 w65535\n\nw2\n")
    corpus = open_corpus([tmp_path / "a.txt"], Vocabulary.load(tmp_path), tmp_path)
    assert corpus.tokens.dtype == np.uint32 and corpus.tokens.tolist() == [6, 65540, 7]


def test_a_very_long_line(vocabulary, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 400_000 + "\n" + "x" * 100_000 + "\n\nend\n")
    corpus = open_corpus([path], vocabulary, tmp_path)
    lengths = np.diff(corpus.sentences).tolist()
    assert lengths[0] >= 400_000 and lengths[1] == 1  # a word of so many letters is unknown


def test_building_takes_little_memory(vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_BATCH", 5000)
    path, line = tmp_path / "a.txt", "the documentation of the standard library " * 10 + "\n"
    path.write_text((line * 10 + "\n") * 500)
    tracemalloc.start()
    try:
        corpus = open_corpus([path], vocabulary, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert corpus.tokens.nbytes > 500_000 > 2 * peak


def test_it_is_made_once(text, vocabulary, tmp_path):
    first = open_corpus([text], vocabulary, tmp_path)
    inode = (first.directory / "tokens.bin").stat().st_ino
    steps: list[int] = []
    again = open_corpus([str(text)], vocabulary, tmp_path, steps.append)
    assert (again.directory / "tokens.bin").stat().st_ino == inode and not steps
    assert unpack(again) == unpack(first)


def test_progress_is_that_of_the_files(text, vocabulary, tmp_path):
    steps: list[int] = []
    open_corpus([text], vocabulary, tmp_path, steps.append)
    assert sum(steps) == text.stat().st_size


def test_it_is_made_anew_when_a_text_changes(vocabulary, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    before = open_corpus([path], vocabulary, tmp_path / "cache")
    held = unpack(before)
    path.write_text("two\n\none\n")
    os.utime(path, ns=(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = open_corpus([path], vocabulary, tmp_path / "cache")
    assert unpack(after) == held[::-1] and after.directory == before.directory
    assert unpack(before) == held  # what somebody has open stays
    path.write_text("two\n\none more\n")
    os.utime(path, ns=(1, 1))
    assert unpack(open_corpus([path], vocabulary, tmp_path / "cache")) == encode(vocabulary, [["two"], ["one more"]])


def test_other_vocabularies_and_files_have_their_own(text, vocabulary, tmp_path):
    first = open_corpus([text], vocabulary, tmp_path)
    other = open_corpus([text], Vocabulary.train([text], 700), tmp_path)
    more = tmp_path / "more.txt"
    more.write_text("more")
    longer = open_corpus([text, more], vocabulary, tmp_path)
    assert len({first.directory, other.directory, longer.directory}) == 3
    assert len(longer.documents) == len(first.documents) + 1


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[-4:]
    elif how == "flip":
        data[len(data) // 2 if path.suffix == ".bin" else 0] ^= 1
    else:
        path.unlink()
        return
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens.bin", "sentences.bin", "documents.bin", "header.json"])
@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_damage_is_told_and_repaired(text, vocabulary, tmp_path, name, how):
    corpus = open_corpus([text], vocabulary, tmp_path)
    expected = unpack(corpus)
    damage(corpus.directory / name, how)
    with pytest.raises(DataError, match=r"damaged|cannot be read|is no tokenised corpus"):
        Corpus.open(corpus.directory)
    with pytest.warns(UserWarning, match="are made anew: .*(damaged|cannot be read|is no tokenised corpus)"):
        assert unpack(open_corpus([text], vocabulary, tmp_path)) == expected
    assert unpack(Corpus.open(corpus.directory)) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 99}, "format 99, of another version"),
        ({"columns": []}, "header.json is damaged"),
        ({"columns": {"tokens": {}}}, "header.json is damaged"),
        ({"vocabulary": None}, "header.json is damaged"),
        ({"sources": None}, "header.json is damaged"),
    ],
)
def test_headers_that_are_wrong(text, vocabulary, tmp_path, change, message):
    corpus = open_corpus([text], vocabulary, tmp_path)
    path = corpus.directory / "header.json"
    header = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in header.items() if v is not None}))
    with pytest.raises(DataError, match=message):
        Corpus.open(corpus.directory)
    with pytest.warns(UserWarning, match="made anew"):
        open_corpus([text], vocabulary, tmp_path)


def test_a_build_that_fails_leaves_nothing_and_breaks_nothing(text, vocabulary, tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("fine\n")
    cache = tmp_path / "cache"
    before = open_corpus([text, path], vocabulary, cache)
    path.write_bytes(b"not fine: \xff\n")
    with pytest.raises(DataError, match=r"b\.txt:1: not UTF-8"):
        open_corpus([text, path], vocabulary, cache)
    assert list(cache.iterdir()) == [before.directory]
    assert len(Corpus.open(before.directory).tokens) == len(before.tokens)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "a.txt: no words"),
        ("\n \n\x01\n", "a.txt: no words"),
        ("one\ntwo\n", "a.txt: a single document, where pairs .* a blank line between documents"),
    ],
)
def test_texts_that_will_not_do(vocabulary, tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        open_corpus([path], vocabulary, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(text, vocabulary, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file.* cannot be written: (Not a directory|File exists)"):
        open_corpus([text], vocabulary, tmp_path / "file")


def test_other_processes_map_the_same_files(text, vocabulary, tmp_path):
    corpus = open_corpus([text], vocabulary, tmp_path)
    data = pickle.dumps(corpus)
    assert len(data) < 2000 and unpack(pickle.loads(data)) == unpack(corpus)
