"""Checkpoints of a training: directories that appear whole or not at all, and are known when they are damaged."""

import errno
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from bertfast.errors import CheckpointError

_NAME = "step-{:08d}"
_PATTERN = re.compile(r"step-(\d{8,})")
_TEMPORARY, _DAMAGED = ".partial", ".damaged"
SUMS = "SHA256SUMS"  # what `sha256sum --check` reads


class Checkpoints:
    """The checkpoints under a directory, `step-00001000` and so on.

    directory: made when the first is saved. keep: how many of the last are kept, at least 1.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory, self.keep = directory, keep

    def place(self, step: int) -> Path:
        """Where the checkpoint of this step is."""
        return self.directory / _NAME.format(step)

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Have `write(directory)` fill a new checkpoint, and remove those that are too many.

        It gets its name when all of it is on the disk, so that a crash at any moment leaves the earlier ones. Raises
        CheckpointError where it cannot be written: nothing is left of it then, and the earlier ones stand.
        """
        final = self.place(step)
        partial = final.with_name(final.name + _TEMPORARY)
        try:
            _remove(partial)
            partial.mkdir(parents=True)
            write(partial)
            (partial / SUMS).write_text("".join(f"{_sum(path)}  {path.name}\n" for path in _files(partial)))
            for path in (*_files(partial), partial):
                _sync(path)
            os.replace(partial, final)
            _sync(self.directory)
        except BaseException as error:
            _remove(partial)
            if not isinstance(error, Exception):
                raise
            raise CheckpointError(self._failure(step, error)) from error
        for _, path in self._finished()[: -self.keep]:
            _remove(path)
        return final

    def newest(self) -> Path | None:
        """The newest checkpoint that is undamaged; None where there are no checkpoints at all.

        Those that are damaged are renamed, with a warning, and those that a crash left unfinished removed. Raises
        CheckpointError where all are damaged.
        """
        for partial in self.directory.glob(f"*{_TEMPORARY}"):
            _remove(partial)
        finished = self._finished()
        for _, path in reversed(finished):
            if (damage := _damage(path)) is None:
                return path
            aside = path.with_name(path.name + _DAMAGED)
            _remove(aside)
            os.replace(path, aside)
            warnings.warn(f"the checkpoint {path} is damaged ({damage}) and now called {aside.name}", stacklevel=2)
        if finished:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged: nothing is left to go on from, start a new run"
            )
        return None

    def _finished(self) -> list[tuple[int, Path]]:
        """The steps and places of the checkpoints, in order."""
        if not self.directory.is_dir():
            return []
        named = ((_PATTERN.fullmatch(path.name), path) for path in self.directory.iterdir())
        return sorted((int(match[1]), path) for match, path in named if match)

    def _failure(self, step: int, error: Exception) -> str:
        earlier = self._finished()
        stands = f"the one of step {earlier[-1][0]} stands" if earlier else "there is none yet"
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error) or type(error).__name__
        return f"the checkpoint of step {step} cannot be written in {self.directory}: {reason}; {stands}"


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.iterdir()) if path.is_file())


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None for nothing."""
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
        sums = (line.partition("  ") for line in lines)
        wrong = [name for expected, _, name in sums if _sum(checkpoint / name) != expected]
    except (FileNotFoundError, UnicodeDecodeError, IsADirectoryError) as error:
        return str(error)
    return f"{', '.join(wrong)} changed since" if wrong else None if lines else f"{SUMS} is empty"


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
