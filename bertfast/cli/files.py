"""The files of a MODEL, which is a directory or the id of a hub repository, and the texts that a user names."""

import json
from pathlib import Path
from typing import Any

from bertfast import texts
from bertfast.cli.output import UsageError


def check_model(model: str) -> None:
    """UsageError for what is neither a directory nor can be a hub id; a typing error in a path should say so."""
    _directory(model)


def _directory(model: str) -> Path | None:
    """The directory that the model is; None for what can be a hub id. UsageError for everything else."""
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise UsageError(f"{model} is a file: MODEL is the directory that holds config.json, or a hub id")
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of somebody who is not known here
        raise UsageError(f"there is no model directory {model!r}: {error}") from error
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or model.endswith("/") or not model.strip():
        raise UsageError(f"there is no model directory {model!r}")
    return None


def find(model: str, name: str) -> Path | None:
    """Where a file of the model lies on this machine, downloaded if need be; None where the model has no such file."""
    directory = _directory(model)
    if directory is not None:
        path = directory / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(model, name))
    except LocalEntryNotFoundError as error:  # offline the cache cannot tell whether there is such a file
        raise UsageError(
            f"{model!r} is no directory here, and as a hub id {name} can neither be downloaded nor found in the cache"
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(
            f"{model!r} is no directory here, and as a hub id it cannot be downloaded: {_first_line(error)}"
        ) from error


def read_json(model: str, name: str) -> Any:
    """What a JSON file of the model holds; None where there is no such file."""
    path = find(model, name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error


def read_texts(path: str | None, n: int, seed: int = 0) -> list[str]:
    """The lines of the user's file, or n generated texts where there is none."""
    if path is None:
        return texts.sentences(n, seed)
    try:
        return texts.read_lines(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
