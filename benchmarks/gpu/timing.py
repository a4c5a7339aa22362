"""Time on the device, of several ways to compute the same, in interleaved rounds and with cold caches.

A candidate is a list of calls, one for each of several sets of inputs; together they are larger than the L2 cache, so
that no call finds its operands there, and the outputs of all sets stay alive, so that none is written over there. On a
GPU all calls of a candidate are captured in one CUDA graph, whose replays are timed with events: that measures the
kernels, not how fast Python launches them. What cannot be captured is launched call by call, and the record says so.
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from bertfast import backend
from bertfast.measure import Summary

COLD = 3  # times the L2 cache: what the sets of inputs hold together
MOST_SETS = 48
MOST_BYTES = 8 << 30
CALLS = 12  # in a graph at least, so that its own launch hardly counts


class Candidate(NamedTuple):
    """make() gives calls that compute the same on different inputs; `backend` is in force while they are made and run.

    They are made on the stream that they run on: a backward runs on that of its forward. captured: False for what a
    CUDA graph cannot hold.
    """

    make: Callable[[], Sequence[Callable[[], Any]]]
    backend: str | None = None
    captured: bool = True

    def within(self) -> AbstractContextManager:
        return nullcontext() if self.backend is None else backend.use(self.backend)


class _Ready(NamedTuple):
    run: Callable[[], Any]  # all calls once
    calls: int
    how: str


class Timing(NamedTuple):
    """Seconds of a call: the median over the rounds with its interval; how: "graph", "eager" or "host clock"."""

    seconds: float
    low: float
    high: float
    rounds: int
    how: str


def input_sets(device: str, set_bytes: float) -> tuple[int, bool]:
    """How many sets of inputs to rotate, and whether these outgrow the cache."""
    if device == "cpu":
        return 2, False
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    wanted = max(2, -(-COLD * cache // max(int(set_bytes), 1)))
    most = min(MOST_SETS, max(2, MOST_BYTES // max(int(set_bytes), 1)))
    return min(wanted, most), wanted <= most


def measure(
    device: str, candidates: dict[str, Candidate], seconds: float = 0.5, most: int = 30, least: int = 5
) -> tuple[dict[str, Timing], dict[str, str]]:
    """The timing of each candidate, and why those failed that did.

    seconds: begin no further round after so long, once there were `least`.
    """
    ready: dict[str, _Ready] = {}
    errors: dict[str, str] = {}
    stream = torch.cuda.Stream() if device == "cuda" else None
    if stream is not None:
        torch.cuda.synchronize()  # the inputs were made on another
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        for name, candidate in candidates.items():
            try:
                with candidate.within():
                    ready[name] = _prepare(stream, candidate)
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {error}"[:300]
                if stream is not None:
                    torch.cuda.synchronize()  # raises where this process is lost
        times: dict[str, list[float]] = {name: [] for name in ready}
        names, begin = list(ready), time.perf_counter()
        for round_ in range(most if names else 0):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                with candidates[name].within():
                    times[name].append(_time(stream, ready[name].run) / ready[name].calls)
            if round_ + 1 >= least and time.perf_counter() - begin > seconds:
                break
        if stream is not None:
            torch.cuda.synchronize()
    return {name: _timing(times[name], ready[name].how) for name in ready}, errors


def _timing(times: list[float], how: str) -> Timing:
    s = Summary.of(times)
    return Timing(s.median, s.low, s.high, s.n, how)


def _prepare(stream: torch.cuda.Stream | None, candidate: Candidate) -> _Ready:
    """Make the calls, warm them up and, on a GPU, capture them."""
    calls = candidate.make()

    def launch() -> list[Any]:
        return [call() for call in calls]

    for _ in range(1 if stream is None else 2):
        launch()
    if stream is None:
        return _Ready(launch, len(calls), "host clock")
    torch.cuda.synchronize()
    if not candidate.captured:
        return _Ready(launch, len(calls), "eager")
    gc.collect()
    graph, repeats = torch.cuda.CUDAGraph(), -(-CALLS // len(calls))
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                outputs = launch()
    except Exception as error:
        print(f"not captured: {type(error).__name__}: {str(error)[:200]}")
        torch.cuda.synchronize()
        return _Ready(launch, len(calls), "eager")

    def replay(kept: list[Any] = outputs) -> None:  # the outputs' memory stays theirs
        graph.replay()

    replay()
    return _Ready(replay, repeats * len(calls), "graph")


def _time(stream: torch.cuda.Stream | None, run: Callable[[], Any]) -> float:
    if stream is None:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3
