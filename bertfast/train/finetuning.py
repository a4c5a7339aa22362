"""Fine-tuning as Devlin et al. 2019 do it, appendix A.3: a few epochs of AdamW with warm-up, the best of them kept."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bertfast.errors import BertfastError, DataError
from bertfast.train.features import Feature, check_vocabulary
from bertfast.train.metrics import Metrics
from bertfast.train.optimizers import linear_schedule, make_optimizer
from bertfast.train.prediction import infer
from bertfast.train.runner import Runner
from bertfast.train.tasks import Task

_ONE_OF = 10  # rows is held out


@dataclass(frozen=True)
class Settings:
    """How to train. batch_size: sequences. warmup: the share of the steps over which the learning rate rises."""

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 3e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


class Examples(NamedTuple):
    """Rows with labels, and the features that were made of them."""

    rows: Sequence[Any]
    features: Sequence[Feature]


@dataclass(frozen=True)
class Epoch:
    """What came of one epoch. loss: the mean of its steps. best: whether it is the best one so far."""

    number: int
    loss: float
    metrics: Metrics
    best: bool
    predictions: list[dict[str, Any]]


def finetune(
    runner: Runner,
    task: Task,
    training: Examples,
    evaluation: Examples,
    settings: Settings,
    advance: Callable[[float], object] = lambda loss: None,
) -> Iterator[Epoch]:
    """Train the runner's model, epoch by epoch; whoever iterates saves the model after those that are `best`.

    The same seed gives the same weights on the same machine. advance(loss) is called after every step. Raises DataError
    where the tokenizer and the model do not fit, BertfastError where the loss is not finite.
    """
    for examples in (training, evaluation):
        check_vocabulary(examples.features, runner.model)
    torch.manual_seed(settings.seed)
    model, count = runner.model, len(training.features)
    steps = math.ceil(count / settings.batch_size) * settings.epochs
    optimizer = make_optimizer("adamw", model, settings.learning_rate, settings.weight_decay)
    schedule = linear_schedule(optimizer, round(settings.warmup * steps), steps)
    highest = -math.inf
    for number in range(1, settings.epochs + 1):
        losses = []
        model.train()
        for batch in torch.randperm(count).split(settings.batch_size):
            loss = runner.loss([training.features[i] for i in batch.tolist()])
            loss.backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise BertfastError(
                    f"the loss of step {schedule.last_epoch + 1} is {losses[-1]}: try a smaller learning rate"
                )
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(losses[-1])
        predictions = infer(runner, task, *evaluation, settings.batch_size)
        metrics = task.measure(evaluation.rows, predictions)
        # NaN, a correlation with predictions that are all the same, is worse than any number.
        score = metrics[task.metric] if math.isfinite(metrics[task.metric]) else -math.inf
        best = number == 1 or score > highest
        highest = max(highest, score)
        yield Epoch(number, math.fsum(losses) / len(losses), metrics, best, predictions)


def hold_out(task: Task, rows: Sequence[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """The rows to train on and a tenth of them to evaluate with, drawn by the seed from every stratum of the task.

    Both in the order of the file; a row that is alone in its stratum is trained on. Raises DataError where there are
    too few rows for a tenth of them.
    """
    strata = defaultdict(list)
    for place in random.Random(seed).sample(range(len(rows)), len(rows)):
        strata[task.stratum(rows[place])].append(place)
    drawn = [place for places in strata.values() if len(places) > 1 for place in places]
    held = set(drawn[_ONE_OF // 2 :: _ONE_OF])
    if not held:
        raise DataError(f"{len(rows)} rows are too few to hold a tenth of them out: give --eval a file to evaluate on")
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]
