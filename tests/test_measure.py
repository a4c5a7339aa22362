"""Measuring: the order of calls under a fake clock, the statistics against known ones, memory to the byte."""

import json
import math
import os
import time

import numpy as np
import pytest
import torch

from bertfast import machine, measure
from bertfast.measure import Ratio, Summary, converged, interleave, peak_memory


class Clock:
    """A clock that only the calls move."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def call(self, name, seconds, log):
        def run(*arguments):
            log.append((name, *arguments))
            self.now += seconds

        return run


def test_rounds_alternate_and_warmup_is_not_timed():
    clock, log = Clock(), []
    calls = {"a": clock.call("a", 2.0, log), "b": clock.call("b", 1.0, log)}
    times = interleave(calls, rounds=3, warmup=2, clock=clock)
    assert times == {"a": [2.0] * 3, "b": [1.0] * 3}
    assert "".join(name for (name,) in log) == "abba" + "abbaab"


def test_calls_are_apart_where_they_are_to_settle():
    began, ended = [], []

    def call():
        began.append(time.perf_counter())
        ended.append(time.perf_counter())

    measure.interleave({"a": call, "b": call}, rounds=2, warmup=0, settle=0.01)
    assert all(begin - end >= 0.01 for begin, end in zip(began[1:], ended, strict=False))
    with pytest.raises(ValueError, match="settle=-1"):
        measure.interleave({"a": call}, rounds=1, settle=-1)


def test_items_are_handed_out_in_turn():
    clock, log = Clock(), []
    interleave(
        {"a": clock.call("a", 1, log), "b": clock.call("b", 1, log)}, rounds=3, warmup=0, items="xy", clock=clock
    )
    assert log == [("a", "x"), ("b", "x"), ("b", "y"), ("a", "y"), ("a", "x"), ("b", "x")]


def test_three_calls_take_turns_at_going_first():
    clock, log = Clock(), []
    interleave({name: clock.call(name, 1, log) for name in "abc"}, rounds=4, warmup=0, clock=clock)
    assert "".join(name for (name,) in log) == "abc" + "bca" + "cab" + "abc"


def test_seconds_end_it_after_a_whole_round():
    clock, log, shares = Clock(), [], []
    calls = {"a": clock.call("a", 2.0, log), "b": clock.call("b", 1.0, log)}
    times = interleave(calls, seconds=7.0, warmup=5, clock=clock, progress=shares.append)
    assert len(times["a"]) == len(times["b"]) == 3  # 9 seconds: the first whole round beyond 7
    assert shares == pytest.approx([3 / 7, 6 / 7, 1.0])
    assert len(interleave(calls, seconds=1e-9, warmup=0, clock=clock)["a"]) == 1
    assert len(interleave(calls, rounds=2, seconds=1e9, warmup=0, clock=clock)["a"]) == 2


def test_rounds_go_on_until_every_median_is_known():
    clock, draw = Clock(), np.random.default_rng(0)

    def noisy(spread):
        def call():
            clock.now += math.exp(spread * draw.normal())

        return call

    def measured(precision, **options):
        calls = {"quiet": noisy(1e-6), "noisy": noisy(0.1)}
        return interleave(calls, precision=precision, seconds=3000.0, warmup=0, clock=clock, **options)

    coarse, fine = measured(0.2), measured(0.05)
    assert 6 <= len(coarse["noisy"]) < 40 < len(fine["noisy"]) == len(fine["quiet"]) < 400
    assert converged(coarse, 0.2) and converged(fine, 0.05) and not converged(coarse, 0.05)
    assert len(measured(1e-4)["quiet"]) > 1000, "the time ends what will not be known"
    assert len(measured(10.0)["quiet"]) == 6, "five hold no interval"
    assert len(measured(10.0, least=9)["quiet"]) == 9


def test_precision_is_that_of_the_whole_interval_at_95_percent():
    values = [99.0, 99.5, 100.0, 100.5, 101.0, 101.5]  # six: the interval is from end to end
    assert converged({"a": values}, 0.026) and not converged({"a": values}, 0.024)
    assert not converged({"a": values, "b": [1.0, 2.0] * 3}, 0.026), "one is not known"
    assert not converged({"a": [1.0] * 5}, 0.5)
    assert not converged({"a": [0.0] * 9}, 0.5), "a clock that stands still measures nothing"


def test_with_items_only_whole_passes_end_by_precision():
    clock, log = Clock(), []
    calls = {"a": clock.call("a", 1.0, log)}
    assert len(interleave(calls, precision=0.1, seconds=1e9, warmup=0, items="vwxyz", clock=clock)["a"]) == 10


def test_least_rounds_are_run_whatever_the_time():
    clock, log = Clock(), []
    calls = {"a": clock.call("a", 2.0, log)}
    assert len(interleave(calls, seconds=1.0, least=4, warmup=0, clock=clock)["a"]) == 4
    assert len(interleave(calls, seconds=20.0, least=4, warmup=0, clock=clock)["a"]) == 10


def test_what_the_harness_takes_itself_is_below_a_hundredth_of_the_shortest_call():
    """All that a round takes beyond its calls, against a millisecond: the suite's shortest workloads take a few."""

    def share():
        calls = {name: (lambda: None) for name in "abcdefgh"}
        begin = time.perf_counter()
        times = interleave(calls, rounds=200, precision=1e-6, least=200, warmup=0)
        return (time.perf_counter() - begin) / sum(map(len, times.values())) / 1e-3

    assert min(share() for _ in range(5)) < 0.01


def test_equal_calls_differ_by_less_than_their_intervals():
    """In nineteen of twenty repetitions, but never in fewer than nine of ten of these hundred."""
    within = 0
    for seed in range(100):
        clock, draw = Clock(), np.random.default_rng(seed)

        def call(clock=clock, draw=draw):
            clock.now += math.exp(0.04 * draw.normal()) * (1 + (draw.random() < 0.1) * draw.random())

        times = interleave({"a": call, "b": call}, precision=0.03, seconds=100.0, warmup=0, clock=clock)
        ratio = Ratio.of(times["a"], times["b"])
        within += ratio.low <= 1 <= ratio.high
    assert within >= 90


@pytest.mark.parametrize(
    ("calls", "options", "words"),
    [
        ({}, {"rounds": 1}, "nothing to time"),
        ({"a": print}, {"rounds": 1, "items": []}, "nothing to time"),
        ({"a": print}, {}, "never end"),
        ({"a": print}, {"rounds": 0}, "rounds=0"),
        ({"a": print}, {"seconds": 0.0}, "seconds=0"),
        ({"a": print}, {"seconds": 1.0, "precision": 0.0}, "precision=0"),
        ({"a": print}, {"rounds": 1, "least": 0}, "least=0"),
        ({"a": print}, {"precision": 0.1}, "never end"),
    ],
)
def test_measurements_that_make_no_sense(calls, options, words):
    with pytest.raises(ValueError, match=words):
        interleave(calls, **options)


def test_summary_of_known_numbers():
    summary = Summary.of([float(i) for i in range(100, 0, -1)])
    assert (summary.n, summary.median) == (100, 50.5)
    assert (summary.p90, summary.p99) == (pytest.approx(90.1), pytest.approx(99.01))
    assert (summary.low, summary.high) == (40.0, 61.0)  # the tables' ranks for n = 100
    assert (Summary.of([3.0, 1.0, 2.0]).low, Summary.of([3.0, 1.0, 2.0]).high) == (1.0, 3.0)
    with pytest.raises(ValueError, match="no measurements"):
        Summary.of([])


@pytest.mark.parametrize("n", [6, 9, 20, 101, 3000])
def test_interval_of_the_median_covers_95_percent_and_is_the_shortest_that_does(n):
    ordered = Summary.of([float(i) for i in range(n)])
    skip = int(ordered.low)
    assert ordered.high == n - 1 - skip

    def covered(skip):
        return 1 - 2 * sum(math.comb(n, k) for k in range(skip + 1)) / 2**n

    assert covered(skip) >= 0.95 > covered(skip + 1)


def test_interval_of_very_many_is_the_tables_or_one_rank_wider():
    summary = Summary.of([float(i) for i in range(10_000)])
    assert summary.low in (4900.0, 4901.0) and summary.high == 9999 - summary.low  # 4901 by the binomial distribution
    begin = time.perf_counter()
    Summary.of(np.zeros(1_000_000))
    assert time.perf_counter() - begin < 5


def test_ratio_keeps_rounds_together():
    draw = np.random.default_rng(0)
    noise = draw.lognormal(sigma=1.0, size=50)
    together = Ratio.of(2.0 * noise, noise)
    assert (together.value, together.low, together.high) == pytest.approx((2.0, 2.0, 2.0))
    shuffled = draw.permutation(noise)
    apart = Ratio.of(2.0 * shuffled, noise)
    assert apart.value == pytest.approx(2.0) and apart.low < 1.7 and apart.high > 2.3
    assert apart == Ratio.of(2.0 * shuffled, noise), "the seed is fixed"
    for a, b in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="same rounds"):
            Ratio.of(a, b)


def test_peak_memory_is_that_of_the_highest_point():
    x = torch.ones(1000, 1000)

    def call():
        y = x * x  # 4 MB
        z = y * y  # 8 MB at once
        del y
        return z * z  # 8 MB again

    assert 8e6 <= peak_memory(call) < 8.01e6
    assert peak_memory(call) == peak_memory(call)
    assert peak_memory(lambda: None) == 0


def test_peak_memory_is_silent_and_leaves_the_environment_alone(capfd):
    before = dict(os.environ)
    peak_memory(lambda: torch.ones(3) * 2)
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")


def test_environment_says_where_it_was_measured():
    record = json.loads(json.dumps(measure.environment()))
    assert record["threads"] == torch.get_num_threads() and record["cores"] >= 1
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["bertfast"]
    assert record["cpu"] and record["time"].endswith("Z")


def test_cpu_features_from_cpuinfo(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(
        "model name\t: Some Chip\nflags\t\t: fpu avx2 avx512f\n\nmodel name\t: Another\nflags\t: amx_tile\n"
    )
    assert machine.cpu_model(path) == "Some Chip"
    features = machine.cpu_features(path)
    assert features["avx2"] and features["avx512f"] and not features["amx_tile"] and not features["avx512_bf16"]
    assert machine.cpu_features(tmp_path / "none") is None and machine.cpu_model(tmp_path / "none")


def test_no_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert machine.git_commit() is None
