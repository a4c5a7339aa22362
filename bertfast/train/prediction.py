"""What a fine-tuned model says of rows."""

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
    advance: Callable[[int], object] = lambda n: None,
    note: Callable[[str], object] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """The prediction for each row, in their order, as the task's `decode` makes them.

    advance(n) is called when n rows more are done, note(text) where the rows' encoding lost something.
    """
    for start in range(0, len(rows), _PORTION):
        portion = rows[start : start + _PORTION]
        features, lost = task.encode(portion, tokenizer)
        check_vocabulary(features, runner.model)
        if lost:
            note(lost)
        yield from infer(runner, task, portion, features, batch_size)
        advance(len(portion))


def infer(
    runner: Runner, task: Task, rows: Sequence[Any], features: Sequence[Feature], batch_size: int
) -> list[dict[str, Any]]:
    """The prediction for each of the rows that the features were made of."""
    logits = dict(runner.logits(features, batch_size))
    return task.decode(rows, features, [logits[i] for i in range(len(features))])
