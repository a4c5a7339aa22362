"""The texts to pre-train on: UTF-8 files with one sentence a line and a blank line between documents."""

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bertfast.errors import DataError

_ENDINGS = (".txt", ".txt.gz")
_BATCH = 1_000_000  # characters of a batch of lines: enough to keep several cores busy
_LINES = 1024  # between two reports of progress


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that paths name, in their order; of a directory all *.txt and *.txt.gz below it, sorted.

    Raises DataError for a path that is not there, a directory without such files, a file named twice, and no path.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.name.endswith(_ENDINGS) and p.is_file())
            if not below:
                raise DataError(f"{path} holds no *.txt and no *.txt.gz")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"there is no file or directory {path}")
    if not found:
        raise DataError("no texts were given")
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise DataError(f"{path} is named twice: its sentences would count double")
        seen.add(path.resolve())
    return found


def read_lines(path: Path, advance: Callable[[int], Any] = lambda count: None) -> Iterator[str]:
    """The lines of a file, without their ends, blank ones too; only one of them is in memory.

    advance: called now and then with how many more bytes of the file have been read.

    Raises DataError, with the line, where the file is not UTF-8, and where it cannot be read or decompressed.
    """
    try:
        with path.open("rb") as stored, _decompressed(stored, path) as file:
            done = 0
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise DataError(f"{path}:{number}: not UTF-8 text: byte {byte:#04x}") from None
                yield text.rstrip("\r\n")
                if number % _LINES == 0:
                    advance(stored.tell() - done)
                    done = stored.tell()
            advance(stored.tell() - done)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _decompressed(stored: BinaryIO, path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.GzipFile(fileobj=stored) if path.name.endswith(".gz") else stored


def read_batches(path: Path, advance: Callable[[int], Any] = lambda count: None) -> Iterator[list[str]]:
    """The lines of a file, as `read_lines`, by about a million characters at once."""
    batch: list[str] = []
    characters = 0
    for line in read_lines(path, advance):
        batch.append(line)
        characters += len(line) + 1
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
