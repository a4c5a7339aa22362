"""A training's directory: made for these settings, or held by a training with the same ones that goes on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertfast.errors import BertfastError
from bertfast.train.progress import LOG

RUN = "run.json"


class RunError(BertfastError, ValueError):
    """The directory cannot be this training's."""


def open_run(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Make the directory a training's, or see that it is one with these settings. Returns whether it was one already.

    settings: everything that the weights at the end depend on, under the names that the user knows, as JSON has it.
    A training that has not made a step yet, because something was wrong with them, gets the new ones.

    Raises RunError for a directory that holds something else, a file, one that cannot be written, and where a setting
    differs.
    """
    settings = json.loads(json.dumps(settings))
    path = directory / RUN
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists() and any(other != _temporary(path) for other in directory.iterdir()):
            raise RunError(f"{directory} is not empty and holds no training: name a new directory")
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if held == settings:
            return True
        if held is not None and (directory / LOG).exists():
            raise RunError(f"{directory} holds a training with other settings: {_differences(held, settings)}")
        _temporary(path).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(_temporary(path), path)
        return False
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged ({error}): name a new directory") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _differences(held: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    differing = [name for name in {**held, **settings} if held.get(name) != settings.get(name)]
    said = (f"{name} was {_say(held.get(name))} and is {_say(settings.get(name))}" for name in differing)
    return f"{'; '.join(said)}; give the same again, or name a new directory"


def _say(value: Any) -> str:
    return "not given" if value is None else str(value)
