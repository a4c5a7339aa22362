"""Which lines of the results a report is about: of everything measured the newest, and what ran beside it."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.results import OUT_OF_TIME
from benchmarks.workloads import SERIES

Line = dict[str, Any]
Key = tuple[str, ...]

IDENTITY = ("benchmark", "workload", "model", "head", "peer", "precision", "device")
PRECISIONS = ("float32", "bfloat16", "float16", "int8")
# Workloads that are points of the plots' curves, and rows of no table but the one of everything.
CURVES = frozenset(name for series in SERIES.values() for name in series.values())
OURS, UNPACKED, BASELINE = "bertfast", "bertfast-unpacked-weights", "hf-sdpa"
ALONE = "bertfast-native"  # what a patched call would cost without transformers around it


def key(line: Line) -> Key:
    """What a line is a measurement of."""
    return tuple(line[name] for name in IDENTITY)


def measured(line: Line) -> bool:
    """Whether the line has numbers to show."""
    return line["status"] == "measured"


def out_of_time(line: Line) -> bool:
    """Whether nothing stood against measuring but time."""
    return line["status"] == "skipped" and OUT_OF_TIME in line["reason"]


class Lines:
    """The newest line of each key, in the order in which the keys first came.

    environments: the record of each run. Runs are as new as their records say; of equals the later in the file. A line
    that was skipped for want of time says nothing of its peer, and does not take the place of an older line.
    """

    def __init__(self, environments: Mapping[str, Line], measurements: Iterable[Line]) -> None:
        self.environments = dict(environments)
        every = list(measurements)
        self._of_run = {(line["run"], key(line)): line for line in every}
        place = {k: None for k in map(key, every)}
        newest = {key(line): line for line in sorted(every, key=lambda line: (not out_of_time(line), self._time(line)))}
        self._newest = [newest[k] for k in place]

    def _time(self, line: Line) -> str:
        return self.environments.get(line["run"], {}).get("time", "")

    def where(self, **fields: Any) -> list[Line]:
        """The newest lines with these fields."""
        return [line for line in self._newest if all(line[name] == value for name, value in fields.items())]

    def beside(self, line: Line, peer: str, precision: str | None = None) -> Line | None:
        """What another peer measured in the same run on the same workload, in the same precision unless said."""
        of = line | {"peer": peer, "precision": precision or line["precision"]}
        other = self._of_run.get((line["run"], key(of)))
        return other if other is not None and measured(other) else None

    def baseline(self, line: Line) -> Line | None:
        """Hugging Face's line of the same run, in float32 where it has none in the line's precision."""
        return self.beside(line, BASELINE) or self.beside(line, BASELINE, "float32")

    def devices(self, **fields: Any) -> list[str]:
        """The devices of these lines, the CPU first."""
        return sorted({line["device"] for line in self.where(**fields)})

    def runs(self, lines: Iterable[Line]) -> list[Line]:
        """The environments in which these were measured, the newest first."""
        runs = dict.fromkeys(line["run"] for line in sorted(lines, key=self._time, reverse=True))
        return [self.environments[run] for run in runs if run in self.environments]


def machine(environment: Line, device: str) -> str:
    """The machine of a run in a few words."""
    if device != "cpu" and environment.get("gpus"):
        return environment["gpus"][0]["name"]
    threads = environment["threads"]
    return f"{environment['cpu']}, {threads} thread{'' if threads == 1 else 's'}"
