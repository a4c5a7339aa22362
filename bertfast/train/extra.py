"""The packages that only training takes, which `pip install 'bertfast[train]'` brings."""

import importlib
from typing import Any

from bertfast.errors import BertfastError


def need(module: str, purpose: str) -> Any:
    """The module. BertfastError, saying what takes it, where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = error.name.partition(".")[0] if error.name else module
        raise BertfastError(
            f"{purpose} takes {package}, which is not installed: pip install 'bertfast[train]'"
        ) from error
