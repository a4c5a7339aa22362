"""The phases of the pass, in their order, and what a phase is given."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.results import Results


class Phase(NamedTuple):
    """A module with `items(context)`, or with `run(name, context)`, which writes the results itself."""

    module: str
    weight: float  # its share of the time that is left, against the phases after it
    stall: float  # seconds without a word after which an item is taken for hung


# What everything else needs comes first, then what is worth most to know. A phase that needs less leaves the rest to
# those after it.
PHASES = {
    "build": Phase("benchmarks.gpu.build", 6, 400),
    "environment": Phase("benchmarks.gpu.environment", 1, 60),
    "ceilings": Phase("benchmarks.gpu.ceilings", 1.5, 60),
    "parity": Phase("benchmarks.gpu.parity", 4, 120),
    "ops": Phase("benchmarks.gpu.ops", 6, 90),
    "encoder": Phase("benchmarks.gpu.encoder", 6, 200),
    "profiles": Phase("benchmarks.gpu.profiles", 2, 90),
    "sanitizer": Phase("benchmarks.gpu.sanitizer", 2, 300),
}


def phase(name: str) -> Phase:
    """The phase of that name; any module with `items` is one, by its dotted name."""
    return PHASES[name] if name in PHASES else Phase(name, 1, 60)


class Item(NamedTuple):
    """A piece of a phase: measured once, under its key. run() returns the fields of its record."""

    key: str
    run: Callable[[], dict[str, Any]]
    least: float = 2.0  # seconds that it needs, or it is not begun


@dataclass
class Context:
    """What a phase is given."""

    device: str  # "cuda" or "cpu"
    quick: bool  # the smallest shapes, to see that everything runs
    output: Path
    seconds: float  # from now on
    begun: float = field(default_factory=time.monotonic)

    @property
    def results(self) -> Results:
        return Results(self.output / "results.jsonl")

    def left(self) -> float:
        """Seconds until the phase's process is ended."""
        return self.seconds - (time.monotonic() - self.begun)
