"""Models with heads for tasks, and their tokenizers: checkpoints to fine-tune, and models that were fine-tuned here."""

import math
from typing import Any

import torch
from torch import nn

from bertfast.cli.files import read_json
from bertfast.cli.output import UsageError
from bertfast.cli.stock import positions
from bertfast.cli.tokens import length_limit, load
from bertfast.train.saving import TASK_FILE, task_of
from bertfast.train.tasks import Task


def load_task(model: str) -> Task:
    """The task that a model was fine-tuned for. UsageError where it does not say."""
    content = read_json(model, TASK_FILE)
    if content is None:
        raise UsageError(f"{model} has no {TASK_FILE}: MODEL is a directory that bertfast finetune has written")
    try:
        return task_of(content)
    except ValueError as error:
        raise UsageError(f"{model}: {TASK_FILE} is not what bertfast finetune writes: {error}") from error


def load_tokenizer(model: str, task: Task) -> Any:
    """The model's own tokenizer, one of those that know where tokens come from."""
    # Byte-level tokenizers take words (of named entities) only if the first of a text is like those inside of it.
    options = {"add_prefix_space": True} if task.labels_of == "token" else {}
    advice = "save the tokenizer that it was trained with beside the model"
    try:
        tokenizer = load(lambda t: t.AutoTokenizer.from_pretrained(model, **options), model)
    except UsageError as error:
        raise UsageError(f"{error} ({advice})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 makes one of nothing
        raise UsageError(f"{model} has no tokenizer: {advice}")
    if not tokenizer.is_fast:
        raise UsageError(f"{model} has a {type(tokenizer).__name__}, which is none of the tokenizers library")
    return tokenizer


def load_model(model: str, task: Task, seed: int) -> tuple[nn.Module, list[str]]:
    """The checkpoint with a head for the task, in float32, and the parameters that it did not have, of the head.

    They are drawn by the seed. UsageError where parameters of the encoder are missing too, or of another shape.
    """

    def from_pretrained(transformers: Any) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(seed)
        return getattr(transformers, task.head).from_pretrained(
            model, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **task.settings()
        )

    loaded, info = load(from_pretrained, model)
    shapes = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    new = sorted({*info["missing_keys"], *shapes})
    encoder = f"{loaded.base_model_prefix}."
    if broken := [key for key in new if key.startswith(encoder) and ".pooler." not in key]:
        raise UsageError(
            f"{model} does not hold {len(broken)} parameters of the encoder that its config.json describes, such as "
            f"{broken[0]}: is it whole?"
        )
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu"), new


def longest(model: nn.Module, tokenizer: Any, wanted: int | None, most: float = math.inf) -> int:
    """How many tokens a sequence may have: as many as wanted, or else as model and tokenizer allow, up to `most`."""
    limit = positions(model)
    if wanted is not None:
        return length_limit(tokenizer, limit, wanted)
    return int(min(limit, tokenizer.model_max_length, most))
