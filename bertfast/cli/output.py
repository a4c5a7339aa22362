"""What the commands share in speaking to people and scripts: errors, tables, JSON, progress, files."""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm


class UsageError(Exception):
    """Something that the user gave is wrong: the message says what and how to put it right."""

    status = 2


def one_line(message: str) -> str:
    """The message without line breaks: scripts read errors by lines."""
    return " ".join(message.split())


def print_json(record: dict[str, Any]) -> None:
    """One JSON object on one line."""
    print(json.dumps(record, ensure_ascii=False, default=str), flush=True)


def print_note(text: str) -> None:
    """Something that is worth knowing and no result, on stderr."""
    print(f"bertfast: {text}", file=sys.stderr)


def print_table(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Rows in columns as wide as they need to be: the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    for row in rows:
        cells = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]  # noqa: B905 (rows may be short)
        print((indent + "  ".join(cells)).rstrip())


def progress_bar(total: float, description: str, quiet: bool = False, unit: str = "%") -> tqdm:
    """A bar on stderr, if that is a terminal; `quiet` is for --json."""
    return tqdm(
        total=total, desc=description, unit=unit, leave=False, file=sys.stderr, disable=quiet or not sys.stderr.isatty()
    )


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Keeps what libraries log for programmers (heads left out, attempts to reach the hub) from users' terminals."""
    from huggingface_hub.utils import logging as _  # noqa: F401  (it sets its logger's level when it is imported)

    loggers = [logging.getLogger(name) for name in ("bertfast", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` at the end of the block, whole, or not at all after an error.

    Raises UsageError at once where no such file can be written.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a directory: name a file to write")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp's files are private; this one gets the mode that open() would have given it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
