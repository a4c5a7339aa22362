"""Numbers on the command line, which are checked before anything is loaded."""

import argparse
import math
from collections.abc import Callable


def integer(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A type for argparse: an integer within these bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be an integer {_bounds(least, most)}, not {text!r}")
        return value

    return parse


def real(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a finite number within these bounds, of which `above` leaves out the lower one."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            bounds = f"above {least:g}" if above else _bounds(least, most)
            raise argparse.ArgumentTypeError(f"must be a number {bounds}, not {text!r}")
        return value

    return parse


def _bounds(least: float, most: float) -> str:
    return f"of at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
