"""Texts to measure with: real English that every Python carries, and a user's own files.

The English is the standard library's: its language reference (pydoc_data), the docstrings of its modules, and its
licence, cut into sentences. Nothing is downloaded.
"""

import ast
import math
import random
import re
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Those whose docstrings hold the most prose; parsing all of the library would take a minute.
_MODULES = (
    *("cmd", "configparser", "difflib", "doctest", "email/message", "ipaddress", "json/__init__", "logging/__init__"),
    *("mailbox", "pathlib", "shutil", "socket", "statistics", "tarfile", "tempfile", "textwrap", "threading", "timeit"),
    *("traceback", "turtle", "typing", "unittest/case", "unittest/mock"),
)
_MARKUP = re.compile(r"\*\*|``|`|\"\"|\|\||[*_]{2,}|={3,}|-{3,}|~{3,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"(])")


def sentences(
    n: int, seed: int = 0, *, median_words: float = 20.0, sigma: float = 0.6, max_words: int = 400
) -> list[str]:
    """n English texts whose lengths are spread as those of real sentences and short passages are.

    The number of words of each is drawn from a log-normal distribution with this median and this sigma of the
    logarithm, between 1 and max_words; the words are running text from a random place of the standard library's
    documentation. With the defaults, batches of 32 in this order are about 37 % full: each text is padded to the
    longest of its batch. sigma=0 gives texts of one length.

    The same seed gives the same texts under the same Python version.
    """
    if n < 0 or median_words < 1 or sigma < 0 or max_words < 1:
        raise ValueError(f"no texts of {n=}, {median_words=}, {sigma=}, {max_words=}")
    source = corpus()
    draw = random.Random(seed)
    texts = []
    for _ in range(n):
        wanted = min(max(round(math.exp(draw.gauss(math.log(median_words), sigma))), 1), max_words)
        place = draw.randrange(len(source))
        words: list[str] = []
        while len(words) < wanted:
            words += source[place % len(source)].split()
            place += 1
        texts.append(" ".join(words[:wanted]))
    return texts


@cache
def corpus() -> tuple[str, ...]:
    """The sentences of the standard library's documentation, of four words or more, in a fixed order."""
    found = tuple(sentence for document in documents() for sentence in document.sentences)
    if not found:
        raise RuntimeError("this Python was installed without its documentation: give texts of your own")
    return found


class Document(NamedTuple):
    """Sentences in the order in which they were written. name: "topics/…", a module's path, or "LICENSE"."""

    name: str
    sentences: tuple[str, ...]


@cache
def documents(modules: tuple[str, ...] = _MODULES) -> tuple[Document, ...]:
    """The documentation of the language, of these modules, and the licence, each sentence of it where it comes first.

    There is what there is: a stripped-down Python may lack any of them.
    """
    known: set[str] = set()
    found = []
    for name, passages in _sources(modules):
        own = dict.fromkeys(sentence for text in passages for sentence in _cut(text) if sentence not in known)
        known.update(own)
        if own:
            found.append(Document(name, tuple(own)))
    return tuple(found)


def library() -> tuple[str, ...]:
    """The paths of the standard library's modules, as `documents` takes them, without its tests and other people's."""
    root = _library()
    found = (path.relative_to(root).with_suffix("").as_posix() for path in sorted(root.rglob("*.py")))
    return tuple(name for name in found if _NOT_PROSE.isdisjoint(name.split("/")))


_NOT_PROSE = {"test", "tests", "site-packages", "dist-packages", "pydoc_data"}


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources(modules: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """The passages of each document, by its name."""
    with suppress(ImportError):
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield f"topics/{name}", [topics[name]]
    for module in modules:
        path = _library() / f"{module}.py"
        if path.is_file():
            # Parsed rather than imported: an import runs code, and python -OO drops the docstrings.
            with suppress(SyntaxError, UnicodeDecodeError):  # files that show what neither can read
                yield module, _docstrings(path.read_text(encoding="utf-8"))
    licence = _library() / "LICENSE.txt"
    if licence.is_file():
        yield "LICENSE", [licence.read_text(encoding="utf-8")]


def _cut(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        if ">>>" not in paragraph:
            plain = _MARKUP.sub("", " ".join(paragraph.split()))
            yield from (sentence for sentence in _SENTENCE_END.split(plain) if _is_prose(sentence))


def _docstrings(code: str) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(code)) if isinstance(node, documented))
    return [text for text in found if text]


def _is_prose(sentence: str) -> bool:
    """Four words or more that are mostly letters and begin and end like a sentence: no grammar rules, no code."""
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return (
        len(sentence.split()) >= 4
        and sentence[0].isupper()
        and sentence[-1] in ".!?:"
        and letters >= 0.85 * len(sentence)
    )


def read_lines(path: str | Path, *, keep_empty: bool = False) -> list[str]:
    """The lines of a UTF-8 text file, without their ends and, unless they are to be kept, without blank lines.

    Lines end at newlines only, so that the count is that of `wc -l`. Raises OSError where the file cannot be read,
    ValueError where it is not UTF-8 or holds no text.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, not a text file")
    if not path.exists():
        raise FileNotFoundError(f"there is no text file {path}")
    return split_lines(path.read_bytes(), str(path), keep_empty=keep_empty)


def split_lines(data: bytes, name: str, *, keep_empty: bool = False) -> list[str]:
    """As `read_lines`, of bytes that came from the place called `name`."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{name} is not UTF-8 text: byte {data[error.start]:#04x} in line {line}") from None
    # Not splitlines(), which also cuts at form feeds and Unicode's own separators.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not any(line.strip() for line in lines):
        raise ValueError(f"{name} holds no text")
    return lines if keep_empty else [line for line in lines if line.strip()]
