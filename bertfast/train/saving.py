"""A fine-tuned model on the disk: the directory that transformers loads, and what the task has to know beside it."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from bertfast.errors import BertfastError
from bertfast.train.tasks import TASKS, Task

TASK_FILE, METRICS_FILE, CONFUSION_FILE = "finetune.json", "metrics.json", "confusion.png"
_ONE_FILE = "1000GB"  # shards would not take one another's places at once


def write_together(directory: Path, write: Callable[[Path], object]) -> None:
    """write(folder), and then all the files in it take their places in the directory.

    Whatever goes wrong while they are written (a full disk, an interrupt) leaves the directory as it was. Raises
    BertfastError where they cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as name:
            folder = Path(name)
            write(folder)
            for path in sorted(folder.iterdir()):
                os.replace(path, directory / path.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BertfastError(f"{directory} cannot be written: {reason}; what was saved there before is whole") from error


def save_model(folder: Path, model: nn.Module, tokenizer: Any, task: Task) -> None:
    """Write the model, its tokenizer and its task into a folder."""
    model.save_pretrained(folder, max_shard_size=_ONE_FILE)
    tokenizer.save_pretrained(folder)
    write_json(folder / TASK_FILE, {"task": task.name, **asdict(task)})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The content as JSON for people and programs; NaN, which JSON does not have, as null."""
    path.write_text(json.dumps(without_nan(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """The value with None in place of every NaN inside."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if value != value else value


def task_of(content: Any) -> Task:
    """The task that TASK_FILE describes. Raises ValueError for content that describes none."""
    if not isinstance(content, dict) or content.get("task") not in TASKS:
        raise ValueError(f"it names none of the tasks {', '.join(TASKS)}")
    fields = {key: tuple(value) if key == "labels" else value for key, value in content.items() if key != "task"}
    try:
        return TASKS[content["task"]](**fields)
    except TypeError as error:
        raise ValueError(str(error)) from error
