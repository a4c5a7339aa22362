"""The exceptions that are bertfast's own. Everything else is a built-in that says what was wrong with the input.

`ValueError` (shapes, values), `TypeError` (dtypes, kinds of object) and `IndexError` (token ids, positions)
keep their usual meaning.
"""

from typing import Any


class BertfastError(Exception):
    """Base of the exceptions below."""


class BackendError(BertfastError, RuntimeError):
    """A backend that was asked for by name cannot run this call."""


class CheckpointError(BertfastError, ValueError):
    """A checkpoint is missing, corrupt, incomplete, or of an unsupported architecture."""


class UnsupportedModelError(BertfastError, TypeError):
    """The object handed to `patch` holds no model that bertfast knows."""


class DataError(BertfastError, ValueError):
    """A file to train on, or to predict, is not what it should be: the message names the file and the line."""


class QuantizationError(BertfastError):
    """A model would answer too differently in int8, and was left as it was. report: what was measured."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message, report)
        self.report = report

    def __str__(self) -> str:
        return self.args[0]
