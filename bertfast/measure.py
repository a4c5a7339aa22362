"""Measuring time and memory so that two ways of computing the same can be compared honestly.

Times of the compared calls are taken in turn, so that whatever else the machine does meets all of them, and are
summarised by medians with confidence intervals, which one slow round does not move.
"""

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertfast.machine import environment

__all__ = ["PRECISION", "Ratio", "Summary", "converged", "environment", "interleave", "peak_memory"]

PRECISION = 0.03  # a median known to 3 % is worth reporting
_RESAMPLES = 1000
_LEAST = 6  # measurements whose smallest and largest hold a 95 % interval of the median
_EXACT = 4096  # measurements up to which ranks are counted exactly


def interleave(
    calls: Mapping[str, Callable[..., Any]],
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    precision: float | None = None,
    least: int = 1,
    warmup: int = 1,
    items: Sequence[Any] | None = None,
    settle: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds that each call took in each round, all calls once a round: A B, B A, A B, ...

    Args:
        calls: what to time, by name. Which goes first moves on by one in every round.
        rounds: how many rounds; None for as many as fit the time.
        seconds: begin no round after so many seconds of rounds; None for no limit.
        precision: stop before that once the median of every call is known to this share of it, see `converged`; with
            items, after whole passes over them only.
        least: rounds that are run however long they take.
        warmup: rounds that are run first and not timed.
        items: where given, round r hands items[r % len(items)] to every call; otherwise calls take no argument.
        settle: seconds of sleep before each call, which are not timed. Threads of an engine spin for a while after a
            call, PyTorch's for 8 ms, and take the processor from the engine that comes next.
        clock: the time in seconds.
        progress: told after each round which share of the work is done, in (0, 1].

    Returns one list of equal length for each name; times at the same place belong to the same round. Raises
    ValueError where there is nothing to run or no end to it.
    """
    if not calls or (items is not None and not len(items)):
        raise ValueError("nothing to time")
    if rounds is None and seconds is None:
        raise ValueError("give rounds, seconds or both: otherwise this would never end")
    if (rounds is not None and rounds < 1) or (seconds is not None and seconds <= 0) or min(warmup, settle) < 0:
        raise ValueError(f"no measurement of {rounds=}, {seconds=}, {warmup=}, {settle=}")
    if (precision is not None and precision <= 0) or least < 1:
        raise ValueError(f"no measurement of {precision=}, {least=}")
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    look = 0  # at the precision after so many rounds

    def run(round_: int, record: bool) -> None:
        arguments = () if items is None else (items[round_ % len(items)],)
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            if settle:
                time.sleep(settle)
            start = clock()
            calls[name](*arguments)
            elapsed = clock() - start
            if record:
                times[name].append(elapsed)

    for r in range(warmup):
        run(r, record=False)
    begin, done = clock(), 0
    while True:
        run(done, record=True)
        done += 1
        shares = [0.0]
        if rounds is not None:
            shares.append(done / rounds)
        if seconds is not None:
            shares.append((clock() - begin) / seconds)
        if precision is not None and done >= max(look, least) and done % (1 if items is None else len(items)) == 0:
            if converged(times, precision):
                shares.append(1.0)
            # Seldom: every look is a chance to stop at an interval that is short by luck.
            look = done + max(done // 8, 1)
        if progress is not None:
            progress(min(max(shares), 1.0))
        if done >= least and max(shares) >= 1.0:
            return times


def converged(times: Mapping[str, Sequence[float]], precision: float = PRECISION) -> bool:
    """Whether the median's interval (95 %) of every call, from end to end, is shorter than this share of the median."""
    for values in times.values():
        n, ordered = len(values), sorted(values)
        skip = _ranks_to_skip(n)
        if n < _LEAST or ordered[n - 1 - skip] - ordered[skip] >= precision * ordered[n // 2]:
            return False
    return True


@dataclass(frozen=True)
class Summary:
    """What a list of measurements says: n of them, percentiles, and an interval for the median.

    low, high: the confidence interval of the median (95 %) by ranks: it asks nothing of the distribution. Up to five
    measurements cannot be that sure of anything; there it spans all of them.
    """

    n: int
    median: float
    p90: float
    p99: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """The summary of these measurements. ValueError where there are none."""
        if not len(values):
            raise ValueError("no measurements to summarise")
        ordered = np.sort(np.asarray(values, dtype=np.float64))
        median, p90, p99 = np.quantile(ordered, (0.5, 0.9, 0.99)).tolist()
        skip = _ranks_to_skip(len(ordered))
        return cls(len(ordered), median, p90, p99, float(ordered[skip]), float(ordered[len(ordered) - 1 - skip]))


def _ranks_to_skip(n: int) -> int:
    """How many values at either end a confidence interval of the median leaves out.

    The number of measurements below the median is binomial (n, 1/2); the tail at each end may hold 2.5 %.
    """
    if n > _EXACT:  # where the normal distribution gives the same rank, or one to the safe side
        return math.floor((n - 1.96 * math.sqrt(n)) / 2 - 1)
    tail, ways = 0, 1  # out of 2^n, in whole numbers
    for k in range(n // 2 + 1):
        tail += ways
        if tail * 40 > 2**n:  # more than 2.5 %
            return max(k - 1, 0)
        ways = ways * (n - k) // (k + 1)
    return 0


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its confidence interval (95 %)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> "Ratio":
        """median(numerator) / median(denominator) of the times of the same rounds.

        The interval is a bootstrap's over whole rounds: what slowed both calls of a round stays together. ValueError
        where the lists are empty or of different lengths.
        """
        a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
        if a.shape != b.shape or a.ndim != 1 or not a.size:
            raise ValueError(f"a ratio needs two lists of the same rounds, not {a.size} and {b.size} measurements")
        draw = np.random.default_rng(seed)
        ratios = np.empty(_RESAMPLES)
        for i in range(_RESAMPLES):
            rounds = draw.integers(a.size, size=a.size)
            ratios[i] = np.median(a[rounds]) / np.median(b[rounds])
        low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
        return cls(float(np.median(a) / np.median(b)), low, high)


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes by which PyTorch's CPU tensors grow at the highest point of `call()` over what there was before.

    Read from the allocator's own records, so the same call gives the same number on every run, unlike the resident
    size of the process, which includes what malloc keeps. Memory that oneDNN or a kernel takes for itself between two
    lines of PyTorch is not in it.
    """
    import torch

    with _quiet_profiler():
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            result = call()
        del result
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        if event["args"]["Device Type"] == 0:  # the CPU
            now += event["args"]["Bytes"]
            peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps PyTorch's profiler from writing its own start and stop to the error stream."""
    variable = "KINETO_LOG_LEVEL"
    if variable in os.environ:
        yield
        return
    os.environ[variable] = "99"
    try:
        yield
    finally:
        del os.environ[variable]
