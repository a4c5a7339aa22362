"""The tasks that models are fine-tuned for, one module a kind of input."""

from bertfast.train.tasks.answers import Answers
from bertfast.train.tasks.entities import Entities
from bertfast.train.tasks.sequences import Classification, Pairs, Regression
from bertfast.train.tasks.task import Encoded, Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Pairs, Regression, Entities, Answers)}

__all__ = ["TASKS", "Answers", "Classification", "Encoded", "Entities", "Pairs", "Regression", "Task"]
