"""A training's directory: made for these settings, or held by a training with the same ones that goes on."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bertfast.errors import BertfastError
from bertfast.train.progress import LOG

RUN, _TEMPORARY, _LOCK = "run.json", ".run.json.tmp", ".lock"

_UNFINISHED = (".saving-*", "*/.building-*")  # what a process that was killed was about to put in place


class RunError(BertfastError, ValueError):
    """The directory cannot be this training's."""


@contextmanager
def held_directory(directory: Path) -> Iterator[None]:
    """A training's directory, made if need be, is no other process's inside of the block.

    What another one, which was killed, left unfinished in it is removed.

    Raises RunError where it is one's, where it holds something else than a training, and where it cannot be written.
    """
    import fcntl

    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / RUN).exists() and {path.name for path in directory.iterdir()} - {_LOCK, _TEMPORARY}:
            raise RunError(f"{directory} is not empty and holds no training: name a new directory")
        lock = (directory / _LOCK).open("w")
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from error
    with lock:  # which is given back with the file, however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is training in {directory}: stop it, or name a new directory") from None
        for unfinished in (path for pattern in _UNFINISHED for path in directory.glob(pattern)):
            shutil.rmtree(unfinished)
        yield


def open_run(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Note that a directory's training has these settings, or see that it has. Returns whether it had them already.

    settings: everything that the weights at the end depend on, under the names that the user knows, as JSON has it.
    A training that has not made a step yet, because something was wrong with them, gets the new ones.

    Raises RunError where a setting differs, and where the directory cannot be written.
    """
    settings = json.loads(json.dumps(settings))
    path, temporary = directory / RUN, directory / _TEMPORARY
    try:
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if held == settings:
            return True
        if held is not None and (directory / LOG).exists():
            raise RunError(f"{directory} holds a training with other settings: {_differences(held, settings)}")
        temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return False
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged ({error}): name a new directory") from error


def _differences(held: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    differing = [name for name in {**held, **settings} if held.get(name) != settings.get(name)]
    said = (f"{name} was {_say(held.get(name))} and is {_say(settings.get(name))}" for name in differing)
    return f"{'; '.join(said)}; give the same again, or name a new directory"


def _say(value: Any) -> str:
    return "not given" if value is None else str(value)
