"""Reading files to train on: every format, and one line that says where it is for everything that is wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bertfast.errors import DataError
from bertfast.train.rows import Answer, Columns, TaggedRow, TextRow, read_questions, read_tagged, read_texts

TABLE = [("it, was", "good"), ('a "cat"\nsat', "bad"), ("çà et là", "good")]


def write(path: Path, content: str | bytes | list | dict) -> Path:
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(path: Path, **how: Any) -> list[TextRow]:
    options = {"paired": False, "labelled": True, **how}
    return read_texts(path, options.pop("columns", Columns()), **options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'text,label\n"it, was",good\n"a ""cat""\nsat",bad\n\nçà et là,good\n'),
        ("t.csv", '\ufefflabel,text\r\ngood,"it, was"\r\nbad,"a ""cat""\nsat"\r\ngood,çà et là'),
        ("t.tsv", 'text\tlabel\nit, was\tgood\n"a ""cat""\nsat"\t bad\nçà et là\tgood\n'),
        ("t.jsonl", "".join(json.dumps({"text": t, "label": y}) + "\n\n" for t, y in TABLE)),
        ("t.json", json.dumps([{"label": y, "text": t} for t, y in TABLE])),
    ],
    ids=["csv", "csv of Windows", "tsv", "jsonl", "json"],
)
def test_tables(tmp_path: Path, name: str, content: str) -> None:
    for path in (write(tmp_path / name, content), write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))):
        assert [(row.text, row.label) for row in table(path)] == TABLE
        assert {(row.pair, row.label) for row in table(path, labelled=False)} == {(None, None)}


def test_places(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'text,label\n"a\nb",1\nc,2\n')
    assert [row.place for row in table(path)] == [f"{path}:2", f"{path}:4"]
    path = write(tmp_path / "t.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": true}\n')
    assert [(row.place, row.label) for row in table(path)] == [(f"{path}:1", "1"), (f"{path}:3", "true")]


def test_which_columns_are_taken(tmp_path: Path) -> None:
    record = {"sentence": "s", "sentence1": "1", "sentence2": "2", "x": "x", "label": "l", "y": "y"}
    path = write(tmp_path / "t.jsonl", record)

    def found(paired: bool | None, **names: str) -> tuple:
        [row] = table(path, paired=paired, columns=Columns(**names))
        return row.text, row.pair, row.label

    assert found(False) == found(None) == ("s", None, "l")
    assert found(True) == ("1", "2", "l")
    assert found(False, text="x", label="y") == ("x", None, "y")
    assert found(True, text="x", pair="y") == found(None, text="x", pair="y") == ("x", "y", "l")
    assert found(True, pair="x") == ("s", "x", "l")
    pair = write(tmp_path / "p.jsonl", {"text_a": "a", "text_b": "b", "label": 1.5})
    assert [(row.text, row.pair, row.label) for row in table(pair, paired=None)] == [("a", "b", "1.5")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "text,label\n", "holds no rows"),
        ("t.csv", "said,label\na,b\n", "no column 'text' or 'sentence': it has 'said', 'label'; name the right one"),
        ("t.csv", "text,kind\na,b\n", "no column 'label': it has 'text', 'kind'; name the right one with --label-col"),
        ("t.csv", "text,text\na,b\n", "two columns of one name"),
        ("t.csv", "text,label\na,b\nc\n", ":3: 1 fields where the first line names 2 columns"),
        ("t.csv", "text,label\na,b,c\n", ":2: 3 fields"),
        ("t.csv", 'text,label\na,b\n"c,d\n', ":3: unexpected end of data"),
        ("t.csv", 'text,label\n"a" b,c\n', "quotes inside are doubled"),
        ("t.csv", "text,label\n  ,b\n", ":2: 'text' is empty"),
        ("t.csv", "text,label\na, \n", ":2: the label 'label' is empty"),
        ("t.csv", b"text,label\na,b\nc\xe9,d\n", ":3: not UTF-8 text: byte 0xe9"),
        ("t.csv.gz", b"text", "cannot be read"),
        ("t.csv.gz", gzip.compress(b"text,label\na,b\n" * 99, mtime=0)[:-9], "cannot be read"),
        ("t.xls", "text,label", "what kind of table is it?"),
        ("t.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"', ":2: not JSON"),
        ("t.jsonl", '{"text": "a", "label": "b"}\n3', ":2: a JSON int, not an object"),
        ("t.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"}', ":2: no 'label': there is 'text'"),
        ("t.jsonl", '{"text": 3, "label": "b"}', ":1: 'text' is 3, not a text"),
        ("t.jsonl", '{"text": "a", "label": ["b"]}', ":1: the label 'label' is [\"b\"]"),
        ("t.jsonl", '{"text": "a", "label": null}', ":1: the label 'label' is empty"),
        ("t.json", '[{"text": "a", "label": "b"}, "c"]', ": [1]: a JSON str"),
        ("t.json", "[" * 100_000, "not JSON"),
        ("t.jsonl", '{"text": "a", "label": "b"}\n{"text": "\\uD800 a", "label": "b"}', ":2: not JSON"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(DataError) as error:
        table(write(tmp_path / name, content))
    assert words in str(error.value) and "t." in str(error.value)


def test_pairs_that_are_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "text,label\na,b\n")
    for names in (Columns(), Columns(text="text")):
        with pytest.raises(DataError, match="no column 'text_a' and 'text_b' or 'sentence1' and 'sentence2'"):
            table(path, paired=True, columns=names)
    with pytest.raises(DataError, match=r"no column 'other'.*--pair-column"):
        table(path, paired=True, columns=Columns(text="text", pair="other"))


@pytest.mark.parametrize("path", ["nowhere.csv", ".", "x" * 5000, "~nobody/t.csv"])
def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (table, lambda p: read_tagged(p, labelled=True), lambda p: read_questions(p, labelled=True)):
        with pytest.raises(DataError, match=r"cannot be read|what kind of table"):
            read(Path(path))


# ---- words with tags


def test_conll(tmp_path: Path) -> None:
    lines = "-DOCSTART- -X- O\n\nAnna NNP B-PER\nsat VB O\n\n\n-DOCSTART- -X- O\n\nin\tIN\tO\r\nNew\u00a0York NNP B-LOC"
    path = write(tmp_path / "t.conll", lines)
    expected = [
        TaggedRow(("Anna", "sat"), ("B-PER", "O"), f"{path}:3"),
        TaggedRow(("in", "New\u00a0York"), ("O", "B-LOC"), f"{path}:9"),
    ]
    assert read_tagged(path, labelled=True) == expected
    assert [row.tags for row in read_tagged(path, labelled=False)] == [None, None]
    bare = write(tmp_path / "bare.txt", "Anna\nsat\n\nin\n")
    assert [row.words for row in read_tagged(bare, labelled=False)] == [("Anna", "sat"), ("in",)]


def test_tagged_json(tmp_path: Path) -> None:
    for name in ("tags", "ner_tags"):
        path = write(tmp_path / "t.jsonl", {"tokens": ["Anna", "sat"], name: ["B-PER", "O"]})
        assert read_tagged(path, labelled=True) == [TaggedRow(("Anna", "sat"), ("B-PER", "O"), f"{path}:1")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.conll", "-DOCSTART- O\n\n", "holds no sentences"),
        ("t.conll", "a O\nb\n", ":2: 1 columns where the lines before have 2"),
        ("t.conll", "a O\n\nb x O\n", ":3: 3 columns"),
        ("t.conll", "a\nb\n", ":1: a word without a tag"),
        ("t.jsonl", {"tokens": ["a", "b"], "tags": ["O"]}, ":1: 2 tokens and 1 tags"),
        ("t.jsonl", {"tokens": ["a"], "ner_tags": [0]}, "tags by their names, not by numbers"),
        ("t.jsonl", {"tokens": ["a"]}, ":1: no 'ner_tags': there is 'tokens'"),
        ("t.jsonl", {"tokens": [], "tags": []}, ":1: no tokens"),
        ("t.jsonl", {"tokens": ["a", " "], "tags": ["O", "O"]}, ":1: an empty token"),
    ],
)
def test_tags_that_are_wrong(tmp_path: Path, name: str, content: Any, words: str) -> None:
    with pytest.raises(DataError) as error:
        read_tagged(write(tmp_path / name, content), labelled=True)
    assert words in str(error.value) and "t." in str(error.value)


# ---- questions


def squad(**changes: Any) -> dict[str, Any]:
    question = {"id": "q", "question": "where ?", "answers": [{"text": "Köln", "answer_start": 3}], **changes}
    return {"data": [{"paragraphs": [{"context": "in Köln, Köln", "qas": [question]}]}]}


def test_squad(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", squad())
    [row] = read_questions(path, labelled=True)
    assert (row.id, row.question, row.context) == ("q", "where ?", "in Köln, Köln")
    assert row.answers == (Answer("Köln", 3),) and row.place == f"{path}: data[0].paragraphs[0].qas[0]"
    for changes in ({"is_impossible": True}, {"is_impossible": True, "answers": []}):
        [row] = read_questions(write(path, squad(**changes)), labelled=True)
        assert row.answers == ()
    [row] = read_questions(write(path, squad(answers=None)), labelled=False)
    assert row.answers == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "no list 'data'"),
        ([], "no list 'data'"),
        ({"data": []}, "holds no questions"),
        ({"data": [{"x": 1}]}, "data[0] has no list 'paragraphs'"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, "data[0].paragraphs[0] has no text as its 'context'"),
        (squad(question=" "), "qas[0] has no text as its 'question'"),
        (squad(answers=[]), "question q has no answer"),
        (
            squad(answers=[{"text": "Köln", "answer_start": 4}]),
            "the answer 'Köln' of question q is not in its context at 4",
        ),
        (squad(answers=[{"text": "Köln", "answer_start": -10}]), "is not in its context at -10"),
        (squad(answers=[{"text": "Köln"}]), "is not in its context at None"),
        (squad(answers=[{"answer_start": 4}]), "answers has no text as its 'text'"),
    ],
)
def test_questions_that_are_wrong(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(DataError) as error:
        read_questions(write(tmp_path / "t.json", content), labelled=True)
    assert words in str(error.value) and "t.json" in str(error.value)
