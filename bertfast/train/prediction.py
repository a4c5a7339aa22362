"""What a fine-tuned model says of rows."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bertfast.train.features import Feature, check_vocabulary
from bertfast.train.runner import Runner
from bertfast.train.tasks import Task

_PORTION = 4096  # rows that are cut into tokens at a time


def predict(
    runner: Runner,
    task: Task,
    rows: Sequence[Any],
    tokenizer: Any,
    batch_size: int,
    changes: Counter[str],
    advance: Callable[[int], object] = lambda n: None,
) -> Iterator[dict[str, Any]]:
    """The prediction for each row, in their order, as the task's `decode` makes them.

    changes: counts on what had to be done to rows to encode them. advance(n) is called when n rows more are done.
    """
    for start in range(0, len(rows), _PORTION):
        portion = rows[start : start + _PORTION]
        features, found = task.encode(portion, tokenizer)
        check_vocabulary(features, runner.model)
        changes.update(found)
        yield from infer(runner, task, portion, features, batch_size)
        advance(len(portion))


def infer(
    runner: Runner, task: Task, rows: Sequence[Any], features: Sequence[Feature], batch_size: int
) -> list[dict[str, Any]]:
    """The prediction for each of the rows that the features were made of."""
    logits = dict(runner.logits(features, batch_size))
    return task.decode(rows, features, [logits[i] for i in range(len(features))])
