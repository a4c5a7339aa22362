"""One op bench: accuracy, then time, then the ratio to the best peer, in interleaved rounds."""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases.candidates import Candidate, Group, Timed
from bertfast.measure import Ratio, Summary, interleave

LEAST_ROUNDS, MOST_ROUNDS = 7, 100
LEAST_SECONDS = 1e-3  # of a round: what is shorter is repeated, so that neither clock nor turns count
OURS = "ours"
Record = Callable[..., Any]


def measure(benchmark: BenchmarkFixture, group: Group, candidate: Candidate, record: Record) -> None:
    """Time the candidate, where it is right.

    Skips, with the backend's or PyTorch's own reason, where it cannot run, and fails where it is off. record(**fields)
    is given the line that says what became of it; the same is in the benchmark's `extra_info`.
    """
    case, ours = candidate.case, candidate.peer is None
    fields: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "device": case.device,
        "backend": candidate.name,
        "ours": ours,
        "flops": case.flops,
        "bytes": case.nbytes,
        "error": None,
    }
    if ours:
        _end_unless_right(group.accuracy[candidate.name], record, fields)
    with candidate.within():
        try:
            call = group.call(candidate)
        except Exception as error:
            if ours:
                raise
            _skip(f"{type(error).__name__}: {error}"[:300], record, fields)
        benchmark(call)
        if not benchmark.enabled:
            return
        summary = Summary.of(benchmark.stats.stats.data)
        timed = Timed(call, summary.median)
        if not ours:
            group.peers[candidate.name] = timed
        fields |= {
            "median_s": summary.median,
            "low_s": summary.low,
            "high_s": summary.high,
            "rounds": summary.n,
            "gb_per_second": case.nbytes / summary.median / 1e9,
            "gflops": case.flops / summary.median / 1e9,
            "ratio_to": ratio(group, timed) if ours and group.peers else None,
        }
    benchmark.extra_info.update(fields)
    record(**fields, status="measured", reason="")


def _end_unless_right(found: dict[str, Any], record: Record, fields: dict[str, Any]) -> None:
    """End the bench where `check` found no result or a wrong one; the error becomes one of the fields."""
    if "refused" in found:
        _skip(found["refused"], record, fields)
    if isinstance(found["error"], str):
        status, reason = "failed", found["error"]
    else:
        fields["error"] = found["error"]
        if found["accurate"]:
            return
        off = f"off by {found['error']:.1e}" if found["finite"] else "not finite"
        status, reason = "inaccurate", f"{off}, where PyTorch is off by {found['plain_error']:.1e} of the largest value"
    record(**fields, status=status, reason=reason)
    pytest.fail(f"{status} on {fields['backend']}, so not timed: {reason}", pytrace=False)


def _skip(reason: str, record: Record, fields: dict[str, Any]) -> None:
    record(**fields, status="skipped", reason=reason)
    pytest.skip(reason)


def ratio(group: Group, ours: Timed) -> dict[str, Any]:
    """The best peer's time over ours, both anew in interleaved rounds."""
    name, best = min(group.peers.items(), key=lambda item: item[1].seconds)
    repeats = max(1, round(LEAST_SECONDS / ours.seconds))
    fitting = round(2 * group.seconds / (repeats * (ours.seconds + best.seconds)))
    rounds = min(max(LEAST_ROUNDS, fitting), MOST_ROUNDS)
    times = interleave({side: _repeated(t.call, repeats) for side, t in ((OURS, ours), (name, best))}, rounds=rounds)
    found = Ratio.of(times[name], times[OURS])
    return {"peer": name, "value": found.value, "low": found.low, "high": found.high, "rounds": rounds}


def _repeated(call: Callable[[], Any], repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            call()

    return run
