"""The texts to pre-train on: UTF-8 files with one sentence a line and a blank line between documents."""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from bertfast.errors import DataError

_ENDINGS = (".txt", ".txt.gz")
_BATCH = 1_000_000  # characters of a batch of lines: enough to keep several cores busy


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


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file, without their ends, blank ones too; only one of them is in memory.

    Raises DataError, with the line, where the file is not UTF-8, and where it cannot be read or decompressed.
    """
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise DataError(f"{path}:{number}: not UTF-8 text: byte {byte:#04x}") from None
                yield text.rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def read_batches(path: Path) -> Iterator[list[str]]:
    """The lines of a file, as `read_lines`, by about a million characters at once."""
    batch: list[str] = []
    characters = 0
    for line in read_lines(path):
        batch.append(line)
        characters += len(line) + 1
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
