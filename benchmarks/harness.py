"""Measures workloads on peers: accuracy before time, then all that are accurate in interleaved rounds.

One workload on one model is a case. Its peers are made ready, run once apart from what is timed, and their outputs
compared with the stock model's in float64; then rounds go on until every median is known to 3 % or the case's share of
the time is used up. Every peer in every precision gets a record, which says why where it has no times.
"""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import accuracy, models, roofline, training
from benchmarks.contenders import Contenders, Refused, one_line
from benchmarks.goals import GOALS, ROOFLINE
from benchmarks.goals import PEER as OURS
from benchmarks.peers import Peer
from benchmarks.results import OUT_OF_TIME, Record, Writer
from benchmarks.workloads import Batch, Workload
from bertfast.energy import Meter
from bertfast.measure import PRECISION, Ratio, Summary, converged, interleave, peak_memory
from bertfast.noise import Noise, Watch

LEAST_ROUNDS = 6  # a median of fewer has no 95 % interval
_PREPARING = 0.4  # of all the time, at most, for peers that are slow to prepare
_ROUNDS = 0.7  # of what is left, for rounds; the rest for preparing and comparing what comes
_SETTLE = 0.01  # seconds between calls on a CPU
_ENERGY = 2.0  # seconds: the card's counter moves some ten times a second
_COMPARING = 0.4  # of a case's share of the time, at most, for first calls of peers that need not be there
_TRAINING_WORK = 3  # forwards that a training step is worth, about
_OWN_MEMORY = ("onnxruntime", "openvino", "ctranslate2")  # which PyTorch's records do not have

Call = Callable[[], Any]
Key = tuple[str, str]  # peer and precision


class Case(NamedTuple):
    """A workload on a model, by these peers."""

    workload: Workload
    model: str
    peers: Sequence[Peer]


class Candidate(NamedTuple):
    """A peer in a precision that is ready to be timed, and accurate."""

    call: Call  # the whole workload once
    largest: Call  # its largest batch once, for the memory that it takes
    prepare_s: float
    first_call_s: float
    error: dict[str, float]


class Timed(NamedTuple):
    """Seconds of each call in each round, and what else went on meanwhile."""

    seconds: dict[Any, list[float]]
    noise: Noise


def timed(calls: Mapping[Any, Call], device: str, seconds: float, least: int = LEAST_ROUNDS) -> Timed:
    """Interleaved rounds of calls that are warm, each with the wait for its end, and on a CPU apart from the others."""
    if device == "cuda":
        calls = {name: partial(_wait_for, call) for name, call in calls.items()}
    with Watch() as watch:
        limits = {"seconds": max(seconds, 1e-3), "precision": PRECISION, "least": least}
        times = interleave(calls, warmup=0, settle=_SETTLE if device == "cpu" else 0.0, **limits)
    return Timed(times, watch.noise)


def _wait_for(call: Call) -> None:
    call()
    torch.cuda.synchronize()


def one_call(call: Call, device: str) -> tuple[Any, float]:
    """What a call returns, and its seconds with the wait for its end."""
    begin = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def busy(call: Call, times: int = 3) -> dict[str, Any]:
    """Milliseconds of kernels in a call on a GPU, how many there are, and the longest."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: -e.self_device_time_total)
    return {
        "milliseconds": sum(e.self_device_time_total for e in events) / times / 1e3,
        "kernels": sum(e.count for e in events) / times,
        "longest": [[e.key[:90], round(e.self_device_time_total / times, 1)] for e in events[:8]],
    }


def energy(call: Call, meter: Meter | None, seconds: float = _ENERGY) -> float | None:
    """Joules that the GPU uses in a call, from as many as fit the time; None where it does not tell."""
    if meter is None:
        return None
    torch.cuda.synchronize()
    before, begin, calls = meter.joules(), time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        _wait_for(call)
        calls += 1
    after = meter.joules()
    return None if before is None or after is None else (after - before) / calls


def peak_bytes(peer: str, call: Call, device: str) -> int | None:
    """Bytes by which PyTorch's tensors grow in a call; None for engines with memory of their own."""
    if peer.startswith(_OWN_MEMORY):
        return None
    if device == "cpu":
        return peak_memory(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fitting(costs: Mapping[Key, float], seconds: float, needed: Sequence[str]) -> list[Key]:
    """Those of which the least number of rounds fits into the time: the needed peers, then the fastest others."""
    chosen = {key for key in costs if key[0] in needed}
    used = LEAST_ROUNDS * sum(costs[key] for key in chosen)
    for key in sorted(costs, key=costs.get):
        if key not in chosen and used + LEAST_ROUNDS * costs[key] <= seconds:
            chosen.add(key)
            used += LEAST_ROUNDS * costs[key]
    return [key for key in costs if key in chosen]


def overhead(calls: int = 8, rounds: int = 300, repetitions: int = 5) -> float:
    """Seconds that the harness itself takes for a call, beyond the call: those of calls that do nothing, all told."""
    nothing = {str(i): _nothing for i in range(calls)}

    def once() -> float:
        begin = time.perf_counter()
        done = interleave(nothing, rounds=rounds, precision=PRECISION, least=rounds, warmup=0)
        return (time.perf_counter() - begin) / sum(map(len, done.values()))

    return statistics.median(once() for _ in range(repetitions))


def _nothing() -> None:
    pass


def weight(case: Case) -> float:
    """The case's share of the time, against others: as the root of its work, so that short ones get enough rounds."""
    size = models.CONFIGS.get(case.model, models.CONFIGS["base"])
    work = case.workload.padded * size["num_hidden_layers"] * size["hidden_size"] ** 2
    return math.sqrt(work * (_TRAINING_WORK if case.workload.training else 1))


class Harness:
    """Measures cases, within so many seconds in all, and writes the records.

    ceilings: of the machine, see benchmarks.ceilings. say: told a line of every record.
    """

    def __init__(
        self,
        writer: Writer,
        precisions: Sequence[str],
        *,
        device: str,
        threads: int,
        baseline: str,
        seconds: float,
        ceilings: Mapping[str, float],
        say: Callable[[str], object] = print,
    ) -> None:
        self.writer, self.precisions, self.device = writer, tuple(precisions), device
        self.baseline, self.ceilings, self.say = baseline, ceilings, say
        self.needed = (baseline, OURS)
        self._end = time.monotonic() + seconds
        self._contenders = Contenders(device, threads, _PREPARING * seconds, self.needed)
        self._stock: tuple[tuple[str, str], nn.Module] | None = None
        self._comparing = 0.0  # seconds that the case at hand has left for first calls
        self._meter = None
        if device == "cuda":
            self._meter = Meter.find(str(torch.cuda.get_device_properties(0).uuid))
        self._shortest = math.inf
        self.right = True  # as far as bertfast itself goes

    def left(self) -> float:
        """Seconds until the time is over."""
        return self._end - time.monotonic()

    def run(self, cases: Sequence[Case]) -> None:
        """Measure all cases, one after the other, and the harness at the end. What fails ends itself alone."""
        weights = [weight(case) for case in cases]
        for i, case in enumerate(cases):
            if self.left() <= 0:
                self._refuse_all(case, Refused("skipped", f"the time was over before: {OUT_OF_TIME}"))
                continue
            try:
                self._measure(case, weights[i] / sum(weights[i:]))
            except Exception as error:
                self._refuse_all(case, Refused("failed", f"{type(error).__name__}: {one_line(error)}"))
            gc.collect()
        cost = overhead()
        share = None if math.isinf(self._shortest) else cost / self._shortest
        self.writer.write("harness", overhead_s=cost, shortest_s=None if share is None else self._shortest, share=share)

    def _measure(self, case: Case, share: float) -> None:
        workload = case.workload
        stock = self._build(case.model, "pretraining" if workload.training else workload.head)
        longest, most = max(workload.lengths), stock.config.max_position_embeddings
        if longest > most:
            reason = f"{case.model} takes {most} tokens a sequence at most, and this has {longest}"
            return self._refuse_all(case, Refused("skipped", reason))
        batches = workload.batches(stock.config.vocab_size)
        batches = [{name: t.to(self.device) for name, t in batch.items()} for batch in batches]
        self._comparing = self.left() * share * _COMPARING
        candidates = dict((self._trained if workload.training else self._inferred)(case, stock, batches))
        costs = {key: one_call(c.call, self.device)[1] for key, c in candidates.items()}
        seconds = self.left() * _ROUNDS * share
        chosen = fitting(costs, seconds, self.needed)
        for key in candidates.keys() - chosen:
            reason = f"{LEAST_ROUNDS} rounds of {costs[key]:.2g} s do not fit into the time: {OUT_OF_TIME}"
            self._refuse(case, key, Refused("skipped", reason))
        if not chosen:
            return None
        # Fewer rounds, without an interval, rather than far beyond the time.
        least = int(self.left() * _ROUNDS / sum(costs[key] for key in chosen))
        calls = {key: candidates[key].call for key in chosen}
        found = timed(calls, self.device, seconds, min(max(least, 2), LEAST_ROUNDS))
        for key in chosen:
            self._record(case, stock, key, candidates[key], found)
        if found.noise.noisy:
            self.say(f"{workload.name:20} {found.noise}")

    def _build(self, model: str, head: str) -> nn.Module:
        """The stock model; one at a time."""
        if self._stock is None or self._stock[0] != (model, head):
            self._stock = None
            self._contenders.forget()
            gc.collect()
            self._stock = ((model, head), models.build(model, head))
        return self._stock[1]

    def _keys(self, case: Case) -> Iterator[tuple[Peer, str]]:
        """Each peer in each precision: those that have to be there, then the others by precision.

        Engines calibrate for int8 for as long as everything else takes, and are made ready last.
        """
        training = case.workload.training
        peers = sorted(case.peers, key=lambda peer: peer.name not in self.needed)
        asked = [p for p in self.precisions if not (training and p == "int8")]
        first = [(peer, p) for peer in peers for p in asked if peer.name in self.needed]
        then = [(peer, p) for p in asked for peer in peers if peer.name not in self.needed]
        for peer, precision in first + then:
            if precision in peer.precisions and (peer.training or not training):
                yield peer, precision

    def _late(self, key: Key) -> Refused | None:
        """Why a peer that is ready is not even called once: the case's time for that is over."""
        if key[0] in self.needed or self._comparing > 0:
            return None
        return Refused("skipped", f"the workload's time for first calls is used up: {OUT_OF_TIME}")

    def _inferred(self, case: Case, stock: nn.Module, batches: list[Batch]) -> Iterator[tuple[Key, Candidate]]:
        """The peers whose outputs are right; the others get their records."""
        head, largest = case.workload.head, max(batches, key=lambda batch: batch["input_ids"].numel())
        work = sum(step.flops for step in self._steps(case, stock, "float32"))
        right = accuracy.gold(stock, batches, head, accuracy.wide(work))
        for peer, precision in self._keys(case):
            key = peer.name, precision
            ready = self._late(key) or self._contenders.get(peer, stock, head, precision, batches[0])
            if isinstance(ready, Refused):
                self._refuse(case, key, ready)
                continue
            begin = time.monotonic()
            try:
                output, first = one_call(partial(ready.run, batches[0]), self.device)
                # The others one at a time: an engine may use its memory again.
                outputs = itertools.chain([output], map(ready.run, batches[1:]))
                error = accuracy.errors(right, outputs, batches)
            except Exception as exception:
                self._refuse(case, key, Refused("failed", f"{type(exception).__name__}: {one_line(exception)}"))
                continue
            finally:
                self._comparing -= time.monotonic() - begin
            if self._accurate(case, key, error):
                call = partial(_run_all, ready.run, batches)
                yield key, Candidate(call, partial(ready.run, largest), ready.seconds, first, error)

    def _trained(self, case: Case, stock: nn.Module, batches: list[Batch]) -> Iterator[tuple[Key, Candidate]]:
        """The peers whose loss and gradients are right; the others get their records."""
        batch = training.labelled(batches[0])
        work = sum(step.flops for step in self._steps(case, stock, "float32"))
        right = training.gold(stock, batch, accuracy.wide(work))
        for peer, precision in self._keys(case):
            key = peer.name, precision
            setting = self._contenders.setting(stock, "pretraining", precision, batch)
            ready = self._late(key) or self._contenders.attempt(peer, partial(peer.trainable, setting))
            if isinstance(ready, Refused):
                self._refuse(case, key, ready)
                continue
            begin = time.monotonic()
            try:
                error = training.errors(right, training.gradients(ready.run, batch, precision))
                step = training.step(ready.run, batch, precision)
                _, first = one_call(step, self.device)
            except Exception as exception:
                self._refuse(case, key, Refused("failed", f"{type(exception).__name__}: {one_line(exception)}"))
                continue
            finally:
                self._comparing -= time.monotonic() - begin
            if self._accurate(case, key, error):
                yield key, Candidate(step, step, ready.seconds, first, error)

    def _accurate(self, case: Case, key: Key, error: dict[str, float]) -> bool:
        """Whether the error is within the limit; where not, the record says so."""
        fault = accuracy.fault(error, self._limit(case, key[1]))
        if fault:
            self._refuse(case, key, Refused("inaccurate", fault), error=_finite(error))
        return not fault

    def _limit(self, case: Case, precision: str) -> accuracy.Limit:
        return (accuracy.TRAINING_LIMITS if case.workload.training else accuracy.LIMITS)[precision]

    def _steps(self, case: Case, stock: nn.Module, precision: str) -> list[roofline.Step]:
        lengths = case.workload.lengths
        if case.workload.training:
            return roofline.training(stock.config, lengths, precision, sum(p.numel() for p in stock.parameters()))
        return roofline.forward(stock.config, lengths, precision, case.workload.head)

    def _identity(self, case: Case, key: Key, status: str, reason: str = "") -> Record:
        workload = case.workload
        return {
            "benchmark": "training" if workload.training else "inference",
            "workload": workload.name,
            "model": case.model,
            "head": workload.head,
            "peer": key[0],
            "precision": key[1],
            "device": self.device,
            "status": status,
            "reason": reason,
            "sequences": len(workload.lengths),
            "tokens": workload.tokens,
            "padded": workload.padded,
        }

    def _refuse(self, case: Case, key: Key, refused: Refused, **more: Any) -> None:
        self.right &= key[0] != OURS or refused.status == "skipped"
        self.writer.write("measurement", **self._identity(case, key, refused.status, refused.reason), **more)
        self.say(f"{_name(case, key)} {refused.status}: {refused.reason}")

    def _refuse_all(self, case: Case, refused: Refused) -> None:
        for peer, precision in self._keys(case):
            self._refuse(case, (peer.name, precision), refused)

    def _record(self, case: Case, stock: nn.Module, key: Key, candidate: Candidate, found: Timed) -> None:
        """The record of what was measured."""
        peer, precision = key
        times, summary = found.seconds[key], Summary.of(found.seconds[key])
        steps, workload = self._steps(case, stock, precision), case.workload
        floor = roofline.floor(steps, self.ceilings, precision)
        base = next((k for k in ((self.baseline, precision), (self.baseline, "float32")) if k in found.seconds), None)
        speedup = _ratio(found, base, times)
        over_float32 = _ratio(found, (self.baseline, "float32"), times)
        ours = (workload.name, case.model, precision) if peer == OURS and self.device == "cpu" else None
        goal = GOALS.get(ours)
        on_gpu = self.device == "cuda"
        limit = self._limit(case, precision)
        self._shortest = min(self._shortest, summary.median)
        self.writer.write(
            "measurement",
            **self._identity(case, key, "measured"),
            error=candidate.error,
            error_limit=None if math.isinf(limit.max) else limit.max,
            cosine_limit=limit.cosine,
            prepare_s=candidate.prepare_s,
            first_call_s=candidate.first_call_s,
            seconds=[float(f"{t:.6g}") for t in times],
            median_s=summary.median,
            low_s=summary.low,
            high_s=summary.high,
            p90_s=summary.p90,
            p99_s=summary.p99,
            converged=converged({key: times}),
            device_s=busy(candidate.call)["milliseconds"] / 1e3 if on_gpu else None,
            joules=energy(candidate.call, self._meter),
            peak_bytes=peak_bytes(peer, candidate.largest, self.device),
            tokens_per_s=workload.tokens / summary.median,
            sequences_per_s=len(workload.lengths) / summary.median,
            baseline=self.baseline,
            baseline_precision=base and base[1],
            speedup=speedup and asdict(speedup),
            speedup_over_float32=over_float32 and asdict(over_float32),
            flops=sum(step.flops for step in steps),
            bytes=sum(step.nbytes for step in steps),
            roofline_share=floor and floor / summary.median,
            noise=found.noise.to_dict(),
            goal=goal and goal.speedup,
            goal_over=goal and goal.over,
            roofline_goal=ROOFLINE.get(ours),
        )
        ms = f"{1e3 * summary.median:9.2f} ms ({1e3 * summary.low:.2f} to {1e3 * summary.high:.2f})"
        ratio = "" if speedup is None else f" {speedup.value:.2f}x ({speedup.low:.2f} to {speedup.high:.2f})"
        if over_float32 is not None and base[1] != "float32":
            ratio += f", {over_float32.value:.2f}x over float32"
        self.say(f"{_name(case, key)} {ms}{ratio}, {summary.n} rounds")


def _ratio(found: Timed, base: Key | None, times: Sequence[float]) -> Ratio | None:
    """How many times as fast as the baseline of the same rounds; None where it was not there."""
    return Ratio.of(found.seconds[base], times) if base in found.seconds else None


def _run_all(run: Callable[[Batch], Any], batches: Sequence[Batch]) -> None:
    for batch in batches:
        run(batch)


def _name(case: Case, key: Key) -> str:
    return f"{case.workload.name:20} {case.model:6} {key[0]:28} {key[1]:8}"


def _finite(error: Mapping[str, float]) -> dict[str, float | None]:
    """As JSON can have it."""
    return {name: value if math.isfinite(value) else None for name, value in error.items()}
