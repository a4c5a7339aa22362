"""Texts to measure with: reproducible, spread like real ones, and clear words about bad files."""

import statistics

import pytest

from bertfast import texts


def test_same_seed_same_texts():
    assert texts.sentences(20, seed=3) == texts.sentences(20, seed=3)
    assert texts.sentences(20, seed=3) != texts.sentences(20, seed=4)
    assert texts.sentences(20, seed=3)[:5] == texts.sentences(5, seed=3)


def test_lengths_are_lognormal():
    lengths = [len(text.split()) for text in texts.sentences(2048)]
    assert 18 <= statistics.median(lengths) <= 22
    assert min(lengths) < 6 and max(lengths) > 80
    batches = [lengths[i : i + 32] for i in range(0, len(lengths), 32)]
    fill = statistics.mean(sum(batch) / (32 * max(batch)) for batch in batches)
    assert 0.33 < fill < 0.41, "the docstring says 37 %"


def test_bounds_of_lengths():
    assert {len(text.split()) for text in texts.sentences(50, median_words=7, sigma=0)} == {7}
    assert max(len(text.split()) for text in texts.sentences(50, median_words=30, max_words=12)) == 12
    assert texts.sentences(0) == []
    with pytest.raises(ValueError, match="median_words=0"):
        texts.sentences(3, median_words=0)


def test_the_corpus_is_english():
    corpus = texts.corpus()
    assert len(corpus) > 3000 and len(set(corpus)) == len(corpus)
    words = " ".join(corpus).lower().split()
    assert sum(word in {"the", "a", "of", "to", "is", "and", "in"} for word in words) > 0.15 * len(words)
    assert not any(mark in sentence for sentence in corpus for mark in ("``", "**", ">>>", "\n"))


def test_lines_are_those_of_newlines_only(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\r\n\n  \ntwo\u2028still two\x0cyes\nlast".encode())
    assert texts.read_lines(path) == ["one", "two\u2028still two\x0cyes", "last"]
    assert texts.read_lines(path, keep_empty=True) == ["one", "", "  ", "two\u2028still two\x0cyes", "last"]
    path.write_text("one\n\n")
    assert texts.read_lines(path, keep_empty=True) == ["one", ""]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FileNotFoundError, r"there is no text file .*lines\.txt"),
        (b"", ValueError, r"lines\.txt holds no text"),
        (b" \n\n\t\n", ValueError, r"lines\.txt holds no text"),
        (b"fine\nna\xefve\n", ValueError, r"lines\.txt is not UTF-8 text: byte 0xef in line 2"),
    ],
)
def test_bad_files(tmp_path, content, error, words):
    path = tmp_path / "lines.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=words):
        texts.read_lines(path, keep_empty=True)


def test_a_directory_is_no_text_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory"):
        texts.read_lines(tmp_path)


def test_documents_are_the_corpus_in_its_parts():
    documents = texts.documents()
    assert tuple(sentence for document in documents for sentence in document.sentences) == texts.corpus()
    names = [document.name for document in documents]
    assert len(set(names)) == len(names) > 50
    [shutil] = [document for document in documents if document.name == "shutil"]
    assert any("file" in sentence for sentence in shutil.sentences)


def test_the_library_s_modules():
    library = texts.library()
    assert {"shutil", "json/__init__", "unittest/mock"} <= set(library) and len(library) > 300
    assert not any("test" in name.split("/") or "site-packages" in name for name in library)
    assert [document.name for document in texts.documents(("shutil", "no such module"))].count("shutil") == 1
