"""Noise: how much of the machine's processor time went to others while something was measured.

Linux counts the time of all its processors in /proc/stat and that of each process in its own stat file, both in ticks
of a hundredth of a second. What was busy and not this process or its children was others; what the hypervisor took for
its other guests is counted apart, as steal. Elsewhere nothing is known, and nothing is claimed.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Share of the machine's processor time beyond which times are not to be trusted to a few per cent.
NOISY = 0.05
_PROC = Path("/proc")
# Columns of the line "cpu" in /proc/stat; guests' time is in user and nice already.
_IDLE, _IOWAIT, _STEAL, _COLUMNS = 3, 4, 7, 8


@dataclass(frozen=True)
class Noise:
    """Shares of the machine's processor time that other processes and the hypervisor took; None where not known."""

    others: float | None
    steal: float | None

    @property
    def noisy(self) -> bool:
        """Whether others took so much that the times say less than they seem to."""
        return (self.others or 0.0) + (self.steal or 0.0) > NOISY

    def to_dict(self) -> dict[str, Any]:
        return {"others": self.others, "steal": self.steal, "noisy": self.noisy}

    def __str__(self) -> str:
        if self.others is None:
            return "noise: not known on this system"
        taken = f"other processes took {self.others:.0%} of the processors"
        taken += f", the hypervisor {self.steal:.0%}" if self.steal else ""
        return f"NOISY: {taken}; the times are not to be trusted" if self.noisy else f"noise: {taken}"


class _Ticks(NamedTuple):
    """Processor time since the machine began, in ticks."""

    total: int
    busy: int  # of anybody, this process too
    steal: int
    own: int  # of this process and its children


class Watch:
    """Between `with Watch() as watch:` and its end: watch.noise afterwards."""

    def __init__(self, proc: Path = _PROC, pid: int | None = None) -> None:
        self._proc, self._pid = proc, os.getpid() if pid is None else pid
        self.noise = Noise(None, None)

    def __enter__(self) -> "Watch":
        self._begin = _read(self._proc, self._pid)
        return self

    def __exit__(self, *_: object) -> None:
        begin, end = self._begin, _read(self._proc, self._pid)
        if begin is None or end is None or end.total <= begin.total:
            return
        total = end.total - begin.total
        # A child that ended while somebody else was its parent takes its time with it: never less than nothing.
        others = max(end.busy - begin.busy - (end.own - begin.own), 0)
        self.noise = Noise(others / total, (end.steal - begin.steal) / total)


def _read(proc: Path, pid: int) -> _Ticks | None:
    """The ticks until now; None where the system does not tell."""
    try:
        own = _own(proc, pid)
        first = (proc / "stat").read_text().split("\n", 1)[0].split()
        columns = [int(word) for word in first[1 : 1 + _COLUMNS]]
    except (OSError, ValueError):
        return None
    if first[0] != "cpu" or len(columns) < _COLUMNS:
        return None
    steal = columns[_STEAL]
    return _Ticks(sum(columns), sum(columns) - columns[_IDLE] - columns[_IOWAIT] - steal, steal, own)


def _own(proc: Path, pid: int) -> int:
    """Ticks of the process, of its descendants that live, and of those that they have waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # The name, in parentheses, may hold anything, blanks and parentheses too.
            words = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            parents[int(folder.name)] = int(words[1])
            ticks[int(folder.name)] = sum(map(int, words[11:15]))  # utime, stime, and both of waited-for children
        except (OSError, ValueError, IndexError):  # it ended just now
            continue
    total, family = ticks.get(pid, 0), {pid}
    while found := {child for child, parent in parents.items() if parent in family} - family:
        family |= found
        total += sum(ticks[child] for child in found)
    return total
