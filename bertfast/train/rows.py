"""Files of labelled examples, read into rows: tables (CSV, TSV, JSON lines), CoNLL and SQuAD.

A row keeps where it stands in its file, so that whatever is wrong with it can be named. Files ending in .gz are read
too. Nothing is skipped: a row that is not what it should be is a DataError.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertfast.errors import DataError

_DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}
_JSON = (".jsonl", ".json")
_LONGEST_FIELD = 2**31 - 1  # csv's own limit is 128 KiB a field


@dataclass(frozen=True)
class TextRow:
    """A text, or a pair of texts, and its label where it has one. place: "FILE:LINE"."""

    text: str
    pair: str | None
    label: str | float | None
    place: str


@dataclass(frozen=True)
class TaggedRow:
    """A sentence in words, and one tag a word; none where they are not known."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    place: str


@dataclass(frozen=True)
class Answer:
    """A stretch of the context, context[start : start + len(text)] == text."""

    text: str
    start: int


@dataclass(frozen=True)
class QuestionRow:
    """A question about a context. answers: all that people gave; empty where there is none, or none is known."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    place: str


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns; None stands for the defaults, of which those that the table has are taken."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


_DEFAULT_TEXTS = ("text", "sentence")
_DEFAULT_PAIRS = (("text_a", "text_b"), ("sentence1", "sentence2"))
_DEFAULT_LABEL = "label"


def read_texts(path: str | Path, columns: Columns, *, paired: bool | None, labelled: bool) -> list[TextRow]:
    """The rows of a table of texts, labels as they stand there (JSON's numbers and booleans as they are written).

    paired: whether each row has two texts; None leaves it to the columns. labelled: whether labels are read at all.
    Raises DataError for a file that cannot be read, holds no row or lacks a column, and for an empty text or label.
    """
    rows, known = [], None
    for place, record in _records(Path(path)):
        if known is None:
            known = _resolve(columns, record, paired, labelled, path)
        for name in (known.text, known.pair, known.label):
            if name is not None and name not in record:
                raise DataError(f"{place}: no {name!r}: there is {_names(record)}")
        text = _text(record[known.text], known.text, place)
        pair = None if known.pair is None else _text(record[known.pair], known.pair, place)
        label = None if known.label is None else _label(record[known.label], known.label, place)
        rows.append(TextRow(text, pair, label, place))
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _resolve(columns: Columns, record: Mapping[str, Any], paired: bool | None, labelled: bool, path: Any) -> Columns:
    """The columns by name. A text by its default name goes before a pair where both are possible."""
    text, pair = columns.text, columns.pair
    singles = [name for name in _DEFAULT_TEXTS if name in record and name != pair]
    pairs = [names for names in _DEFAULT_PAIRS if set(names) <= record.keys()]
    if text is None and pair is None and pairs and (paired or (paired is None and not singles)):
        text, pair = pairs[0]
    elif text is None:
        text = singles[0] if singles else _absent("text", _DEFAULT_PAIRS if paired else _DEFAULT_TEXTS, record, path)
    if paired and pair is None:
        _absent("pair", _DEFAULT_PAIRS, record, path)
    label = (columns.label or _DEFAULT_LABEL) if labelled else None
    for option, name in (("text", text), ("pair", pair), ("label", label)):
        if name is not None and name not in record:
            _absent(option, (name,), record, path)
    return Columns(text, pair, label)


def _absent(option: str, wanted: tuple, record: Mapping[str, Any], path: Any) -> str:
    names = " or ".join(" and ".join(map(repr, w)) if isinstance(w, tuple) else repr(w) for w in wanted)
    raise DataError(f"{path} has no column {names}: it has {_names(record)}; name the right one with --{option}-column")


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "none"


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r} is {json.dumps(value)}, not a text")
    if not value.strip():
        raise DataError(f"{place}: {name!r} is empty: give it a text, or leave the row out")
    return value


def _label(value: Any, name: str, place: str) -> str | float:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    what = "empty" if value is None or value == "" or isinstance(value, str) else json.dumps(value)
    raise DataError(f"{place}: the label {name!r} is {what}: give every row one")


def read_tagged(path: str | Path, *, labelled: bool) -> list[TaggedRow]:
    """The sentences of a file: JSON lines with `tokens` and `tags` (or `ner_tags`), or else CoNLL.

    CoNLL has a word a line, its tag in the last column, blank lines between sentences, and -DOCSTART- lines, which are
    no sentences. labelled: whether tags are read at all. Raises DataError for a file that cannot be read or holds no
    sentence, and for a sentence that has not one tag a word.
    """
    path = Path(path)
    rows = list((_tagged_records if _kind(path) in _JSON else _tagged_lines)(path, labelled))
    if not rows:
        raise DataError(f"{path} holds no sentences")
    return rows


def _tagged_records(path: Path, labelled: bool) -> Iterator[TaggedRow]:
    for place, record in _records(path):
        words = _strings(record, "tokens", place)
        if not words or not all(word.strip() for word in words):
            raise DataError(f"{place}: {'no tokens' if not words else 'an empty token'}")
        tags = None
        if labelled:
            tags = _strings(record, "tags" if "tags" in record else "ner_tags", place)
            if len(tags) != len(words):
                raise DataError(f"{place}: {len(words)} tokens and {len(tags)} tags: give one tag a token")
        yield TaggedRow(words, tags, place)


def _strings(record: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    if name not in record:
        raise DataError(f"{place}: no {name!r}: there is {_names(record)}")
    values = record[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{place}: {name!r} must be a list of strings (tags by their names, not by numbers)")
    return tuple(values)


def _tagged_lines(path: Path, labelled: bool) -> Iterator[TaggedRow]:
    words: list[str] = []
    tags: list[str] = []
    columns, begin = 0, 1
    for number, line in enumerate([*_read(path).split("\n"), ""], 1):
        fields = re.split(r"[ \t]+", line.strip(" \t\r"))  # not at every Unicode space: a word may hold one
        if fields == [""] or fields[0] == "-DOCSTART-":
            if words:
                yield TaggedRow(tuple(words), tuple(tags) if labelled else None, f"{path}:{begin}")
            words, tags = [], []
            continue
        columns = columns or len(fields)
        if len(fields) != columns:
            raise DataError(f"{path}:{number}: {len(fields)} columns where the lines before have {columns}")
        if labelled and columns < 2:
            raise DataError(f"{path}:{number}: a word without a tag: lines are a word, a space and its tag")
        begin = begin if words else number
        words.append(fields[0])
        tags.append(fields[-1])


def read_questions(path: str | Path, *, labelled: bool) -> list[QuestionRow]:
    """The questions of a file in SQuAD's format, v1.1 or v2 (whose `is_impossible` questions have no answer).

    labelled: whether answers are read at all. Raises DataError for a file that cannot be read or is not in this format,
    for a question without an answer that is not said to be impossible, and for an answer that does not stand in its
    context where it says.
    """
    path = Path(path)
    content = _parse(_read(path), str(path))
    rows = []
    for i, document in enumerate(_list(content, "data", str(path))):
        for j, paragraph in enumerate(_list(document, "paragraphs", f"{path}: data[{i}]")):
            place = f"{path}: data[{i}].paragraphs[{j}]"
            questions = _list(paragraph, "qas", place)
            context = _filled(paragraph, "context", place)
            rows += [_question(q, context, f"{place}.qas[{k}]", labelled) for k, q in enumerate(questions)]
    if not rows:
        raise DataError(f"{path} holds no questions")
    return rows


def _question(record: Any, context: str, place: str, labelled: bool) -> QuestionRow:
    question = _filled(record, "question", place)
    name = str(record.get("id", place))
    if not labelled:
        return QuestionRow(name, question, context, (), place)
    impossible = record.get("is_impossible", False)
    answers = () if impossible else tuple(_answer(a, name, context, place) for a in _list(record, "answers", place))
    if not impossible and not answers:
        raise DataError(f"{place}: question {name} has no answer, and no is_impossible that says so")
    return QuestionRow(name, question, context, answers, place)


def _answer(record: Any, question: str, context: str, place: str) -> Answer:
    text = _filled(record, "text", f"{place}.answers")
    start = record.get("answer_start")
    if type(start) is not int or start < 0 or context[start : start + len(text)] != text:
        raise DataError(f"{place}: the answer {text!r} of question {question} is not in its context at {start}")
    return Answer(text, start)


def _list(record: Any, name: str, place: str) -> list[Any]:
    if not isinstance(record, dict) or not isinstance(record.get(name), list):
        raise DataError(f"{place} has no list {name!r}, as SQuAD's format wants it: data, paragraphs, qas, answers")
    return record[name]


def _filled(record: Any, name: str, place: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(name), str) or not record[name].strip():
        raise DataError(f"{place} has no text as its {name!r}")
    return record[name]


# ---- files


def _kind(path: Path) -> str:
    """The extension that says what the file is, in lower case."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _read(path: Path) -> str:
    """The file as text, its line ends as they are."""
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text: byte {data[error.start]:#04x}") from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table by column, each with its place."""
    kind = _kind(path)
    if kind in _DIALECTS:
        yield from _table(path, _DIALECTS[kind])
    elif kind in _JSON:
        yield from _objects(path)
    else:
        raise DataError(f"{path}: what kind of table is it? Name it .csv, .tsv, .jsonl or .json (.gz may follow)")


def _table(path: Path, dialect: str) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(_LONGEST_FIELD)
    lines = csv.reader(io.StringIO(_read(path), newline=""), dialect, strict=True)
    header: list[str] = []
    number = 1
    try:
        for fields in lines:
            place, number = f"{path}:{number}", lines.line_num + 1
            if not fields:
                continue
            if not header:
                header = fields
                if len(set(header)) < len(header):
                    raise DataError(f"{place}: two columns of one name in {_names(dict.fromkeys(header))}")
                continue
            if len(fields) != len(header):
                raise DataError(f"{place}: {len(fields)} fields where the first line names {len(header)} columns")
            yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}:{number}: {error}: a field that begins with a quote ends with one, and quotes inside are doubled"
        ) from error


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of JSON lines, or of one JSON list."""
    text = _read(path)
    if text.lstrip().startswith("["):
        records = [(f"{path}: [{i}]", value) for i, value in enumerate(_parse(text, str(path)))]
    else:
        lines = ((f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        records = ((place, _parse(line, place)) for place, line in lines)
    for place, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{place}: a JSON {type(record).__name__}, not an object")
        yield place, record


def _parse(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # which escapes of half a character are in the way of
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    return value
