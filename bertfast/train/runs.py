"""A training's directory: made for these settings, or held by a training with the same ones that goes on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertfast.errors import BertfastError

RUN = "run.json"


class RunError(BertfastError, ValueError):
    """The directory cannot be this training's."""


def open_run(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Make the directory a training's, or see that it is one with these settings. Returns whether it was one already.

    settings: everything that the weights at the end depend on, under the names that the user knows, as JSON has it.

    Raises RunError for a directory that holds something else, a file, one that cannot be written, and where a setting
    differs.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = directory / RUN
        if not held.exists():
            if any(path.name != held.name + ".tmp" for path in directory.iterdir()):
                raise RunError(f"{directory} is not empty and holds no training: name a new directory")
            _write(held, settings)
            return False
        _compare(directory, json.loads(held.read_text(encoding="utf-8")), settings)
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise RunError(f"{directory / RUN} is damaged ({error}): name a new directory") from error
    return True


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    """Whole or not at all: a directory without it is nobody's."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _compare(directory: Path, held: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if differing := [name for name in {**held, **settings} if held.get(name) != settings.get(name)]:
        said = "; ".join(f"{name} was {_say(held.get(name))}, now {_say(settings.get(name))}" for name in differing)
        raise RunError(f"{directory} holds a training with other settings: {said}; name a new directory, or the same")


def _say(value: Any) -> str:
    return "not given" if value is None else str(value)
