"""What became faster or slower from one measurement to another, and what of it is more than noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.report import words
from benchmarks.report.lines import BASELINE, Line, Lines, key, machine, measured
from bertfast.measure import Ratio

THRESHOLD = 0.02  # a change that is smaller is nobody's concern, however sure
_RESAMPLES = 10_000
# What a change may be: worse first, and how a table of them is headed.
VERDICTS = {
    "broken": "no longer measured",
    "slower": "regressions",
    "faster": "improvements",
    "unchanged": "unchanged",
    "missing": "missing in B",
    "new": "missing in A",
}
COMPARED = ("slower", "faster", "unchanged")
REGRESSIONS = ("broken", "slower")


@dataclass(frozen=True)
class Change:
    """One thing before and after. ratio: of the medians, after over before, where both were measured."""

    before: Line | None
    after: Line | None
    ratio: Ratio | None = None

    @property
    def line(self) -> Line:
        """Whichever side was measured."""
        return self.before if self.before is not None and measured(self.before) else self.after

    @property
    def verdict(self) -> str:
        """One of VERDICTS. Slower and faster are only said where the interval excludes 1 and the change is worth it."""
        if self.ratio is None:
            if self.line is self.after:
                return "new"
            return "missing" if self.after is None or self.after["status"] == "skipped" else "broken"
        if self.ratio.low > 1 and self.ratio.value > 1 + THRESHOLD:
            return "slower"
        if self.ratio.high < 1 and self.ratio.value < 1 / (1 + THRESHOLD):
            return "faster"
        return "unchanged"


def unpaired(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> Ratio:
    """median(numerator) / median(denominator) of measurements that have nothing to do with each other.

    The interval (95 %) is a bootstrap's that draws from either list by itself.
    """
    draw = np.random.default_rng(seed)
    ratios = _medians(numerator, draw) / _medians(denominator, draw)
    low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
    return Ratio(float(np.median(numerator) / np.median(denominator)), low, high)


def _medians(values: Sequence[float], draw: np.random.Generator) -> np.ndarray:
    """Medians of resamples, without the resamples.

    n draws with replacement are n uniform numbers that say which value to take, so the median is that at the middle
    of them, and the k-th smallest of n uniform numbers is Beta(k, n + 1 - k). Of an even n there are two in the middle,
    the upper of which is the smallest of n - k numbers between the lower one and 1.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    k = (n + 1) // 2
    lower = draw.beta(k, n + 1 - k, _RESAMPLES)
    upper = lower if n % 2 else lower + (1 - lower) * draw.beta(1, n - k, _RESAMPLES)
    at = [np.minimum((n * u).astype(int), n - 1) for u in (lower, upper)]
    return (ordered[at[0]] + ordered[at[1]]) / 2


def changes(before: Lines, after: Lines) -> list[Change]:
    """All that was measured on either side, in the order of the first."""
    old, new = ({key(line): line for line in lines.where()} for lines in (before, after))
    found = []
    for k in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(k), new.get(k)
        there = [line is not None and measured(line) for line in (a, b)]
        if any(there):
            found.append(Change(a, b, unpaired(b["seconds"], a["seconds"]) if all(there) else None))
    return found


def report(before: Lines, after: Lines, found: Sequence[Change]) -> Iterator[str | list[list[str]]]:
    """The comparison as lines of text and tables' rows."""
    yield f"A: {where(before)}"
    yield f"B: {where(after)}"
    if differences := list(unlike(before, after)):
        yield f"NOT THE SAME ENVIRONMENT, so times may not be comparable: {'; '.join(differences)}"
    if factor := drift(found):
        yield (
            f"NOT THE SAME SPEED: {BASELINE} itself took {factor:.3f} times as long in B as in A (median of its "
            "workloads), which nothing in bertfast does"
        )
    for verdict, heading in VERDICTS.items():
        if mine := [change for change in found if change.verdict == verdict]:
            yield f"\n{heading}: {len(mine)}"
            yield list(compared(mine) if verdict in COMPARED else absent(mine))
    yield f"\nB / A is of medians: above 1 is slower. Changes under {THRESHOLD:.0%} are not called any."


def compared(found: Sequence[Change]) -> Iterator[list[str]]:
    """A row for each of these, and one above them."""
    yield ["", "A", "B", "B / A", "95 % interval"]
    for change in found:
        line = change.line
        name = f"{words.workload(line)}: {line['peer']}, {line['precision']}, {line['device']}"
        times = (words.duration(side["median_s"]) for side in (change.before, change.after))
        yield [name, *times, f"{change.ratio.value:.3f}", f"{change.ratio.low:.3f} to {change.ratio.high:.3f}"]


def absent(found: Sequence[Change]) -> Iterator[list[str]]:
    """A row for each workload and reason why these were measured on one side only."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for change in found:
        other = change.after if change.line is change.before else change.before
        reason = "not run" if other is None else f"{other['status']}: {other['reason']}"
        peers = reasons.setdefault((words.workload(change.line), reason), {})
        peers.setdefault(change.line["peer"], []).append(change.line["precision"])
    for (workload, reason), peers in reasons.items():
        names = ", ".join(f"{peer} ({', '.join(precisions)})" for peer, precisions in peers.items())
        yield [f"{workload}: {names}: {reason}"]


def where(lines: Lines) -> str:
    """The runs of one side."""
    return "; ".join(f"run {e['run']} of {e['time']}, commit {words.commit(e)}" for e in lines.runs(lines.where()))


def unlike(before: Lines, after: Lines) -> Iterator[str]:
    """What differs between the machines and the software of the two sides."""
    sides = [[facts(e) for e in lines.runs(lines.where())] for lines in (before, after)]
    for name in dict.fromkeys(name for side in sides for environment in side for name in environment):
        a, b = (sorted({str(environment.get(name, "none")) for environment in side}) for side in sides)
        if a != b:
            yield f"{name} {' and '.join(a)}, then {' and '.join(b)}"


def facts(environment: Line) -> dict[str, Any]:
    """What of an environment bears on speed."""
    versions = {name: version for name, version in environment["versions"].items() if name != "bertfast"}
    return {
        "processor": machine(environment, "cpu"),
        "cores": environment["cores"],
        "GPU": ", ".join(gpu["name"] for gpu in environment["gpus"]) or "none",
        "instructions": environment.get("native_cpu_isa"),
        **versions,
        **environment["variables"],
    }


def drift(found: Sequence[Change]) -> float | None:
    """By which factor Hugging Face's own times changed, where the machine was of another speed."""
    ratios = [change.ratio.value for change in found if change.ratio and change.line["peer"] == BASELINE]
    middle = float(np.median(ratios)) if ratios else 1.0
    return middle if max(middle, 1 / middle) > 1 + THRESHOLD else None
