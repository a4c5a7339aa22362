"""Texts as token ids in memory-mapped files: tokenised once, and never in memory as a whole."""

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from bertfast.errors import DataError
from bertfast.train.sources import find_files, read_batches
from bertfast.train.vocabulary import Vocabulary

_FORMAT = 1
_HEADER = "header.json"
_COLUMNS = ("tokens", "sentences", "documents")  # each in a file of that name, .bin
_CHUNK = 1 << 16  # bytes


class Corpus:
    """Tokenised texts: documents of sentences of tokens, on disk.

    tokens: (tokens,) uint16 or uint32, all sentences behind one another. sentences: (sentences + 1,) int64, where each
    begins among the tokens. documents: (documents + 1,) int64, where each begins among the sentences. All are views of
    mapped files. fingerprint: that of the vocabulary.
    """

    def __init__(self, directory: Path, header: dict[str, Any]) -> None:
        self.directory, self._header = directory, header
        self.fingerprint: str = header["vocabulary"]
        self.tokens, self.sentences, self.documents = (
            np.memmap(directory / f"{name}.bin", dtype=header["columns"][name]["dtype"], mode="r") for name in _COLUMNS
        )

    def __reduce__(self) -> tuple:
        """Other processes map the files, too: pickling the arrays would copy them."""
        return Corpus, (self.directory, self._header)

    @classmethod
    def open(cls, directory: str | Path) -> "Corpus":
        """The corpus in a directory. Raises DataError where it is damaged, which takes reading it once."""
        directory = Path(directory)
        header = _read_header(directory)
        for name in _COLUMNS:
            path = directory / f"{name}.bin"
            if _checksum(path) != header["columns"][name].get("checksum"):
                raise DataError(f"{path} is damaged: it is not what was written")
        return cls(directory, header)


def open_corpus(
    paths: Iterable[str | Path],
    vocabulary: Vocabulary,
    cache: str | Path,
    advance: Callable[[int], Any] = lambda count: None,
) -> Corpus:
    """The texts, tokenised: what the cache directory has of them, if neither they nor the vocabulary have changed.

    paths: as in `find_files`. advance: called now and then with how many more of the files' bytes have been tokenised.
    What the cache holds is complete at any time: a new corpus is built beside it. Of several processes, one should
    build it and the others open it then.

    Raises DataError for texts that cannot be read, texts without a word, and a single document, of which no random
    pairs can be made; warns where what the cache had was damaged.
    """
    files = find_files(paths)
    sources = [[str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]
    names = json.dumps([vocabulary.fingerprint, [name for name, *_ in sources]])
    place = Path(cache) / hashlib.sha256(names.encode()).hexdigest()[:16]
    if place.exists():
        try:
            if _read_header(place)["sources"] == sources:
                return Corpus.open(place)
        except DataError as error:
            warnings.warn(f"the tokenised texts are made anew: {error}", stacklevel=2)
    try:
        _build(place, files, sources, vocabulary, advance)
    except OSError as error:
        raise DataError(f"{place} cannot be written: {error.strerror or error}") from error
    return Corpus.open(place)


class _Column:
    """A file of numbers that is being written."""

    def __init__(self, file: IO[bytes], dtype: str) -> None:
        self.file, self.dtype = file, dtype
        self.count = self.checksum = 0

    def append(self, values: Sequence[int] | np.ndarray) -> None:
        data = np.asarray(values, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.count += len(values)

    def describe(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "count": self.count, "checksum": self.checksum}


def _build(
    place: Path, files: Sequence[Path], sources: list, vocabulary: Vocabulary, advance: Callable[[int], Any]
) -> None:
    """Tokenise the files into `place`, which is replaced at the end, or left as it was after an error."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".building-") as temporary:
        built = Path(temporary) / "corpus"
        built.mkdir()
        columns = _write_columns(built, files, vocabulary, advance)
        header = {"format": _FORMAT, "vocabulary": vocabulary.fingerprint, "sources": sources, "columns": columns}
        (built / _HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
        if place.exists():
            os.replace(place, Path(temporary) / "old")
        os.replace(built, place)


def _write_columns(
    directory: Path, files: Sequence[Path], vocabulary: Vocabulary, advance: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
    tokenizer = type(vocabulary.tokenizer).from_str(vocabulary.tokenizer.to_str())
    tokenizer.encode_special_tokens = True  # a "[MASK]" that somebody wrote is text
    dtypes = dict(zip(_COLUMNS, ("<u2" if vocabulary.size <= 1 << 16 else "<u4", "<i8", "<i8"), strict=True))
    with ExitStack() as files_to_write:
        columns = {
            name: _Column(files_to_write.enter_context((directory / f"{name}.bin").open("wb")), dtype)
            for name, dtype in dtypes.items()
        }
        tokens, sentences, documents = columns.values()
        sentences.append([0])
        documents.append([0])
        begin = 0  # of the document, among the sentences

        def end_document(border: int) -> None:
            nonlocal begin
            if border > begin:
                documents.append([border])
                begin = border

        for path in files:
            for lines in read_batches(path, advance):
                ends, ids = [], []
                encodings = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
                for line, encoding in zip(lines, encodings, strict=True):
                    if found := encoding.ids:
                        ids.append(np.array(found, dtype=tokens.dtype))
                        ends.append(len(found))
                    elif not line.strip():
                        end_document(sentences.count - 1 + len(ends))
                if ids:
                    sentences.append(tokens.count + np.cumsum(ends))
                    tokens.append(np.concatenate(ids))
            end_document(sentences.count - 1)
    if documents.count < 3:
        found = "no words" if documents.count == 1 else "a single document"
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise DataError(
            f"{files[0]}{more}: {found}, where pairs of sentences take two documents at least: "
            "write one sentence a line, and a blank line between documents"
        )
    return {name: column.describe() for name, column in columns.items()}


def _read_header(directory: Path) -> dict[str, Any]:
    """What the header says, if it says all that a corpus takes."""
    path = directory / _HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        version, *_ = header["format"], header["sources"], header["vocabulary"]
        for name in _COLUMNS:
            np.dtype(header["columns"][name]["dtype"])
    except OSError as error:
        raise DataError(f"{directory} is no tokenised corpus: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error!r}") from error
    if version != _FORMAT:
        raise DataError(f"{directory} has format {version}, of another version of bertfast")
    return header


def _checksum(path: Path) -> int:
    checksum = 0
    try:
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                checksum = zlib.crc32(data, checksum)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return checksum
