"""Phase 5: every op on every backend against PyTorch, torch.compile and its attention backends.

For each case the accuracy of each backend is checked against the specification before it is timed; one that is off is
not timed. Then all that are right, and the peers, are timed in interleaved rounds.
"""

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import cases, ceilings, timing
from benchmarks.gpu.cases import CPU_BACKENDS, FORWARD, Case
from benchmarks.gpu.plan import Context, Item
from bertfast import backend
from bertfast.errors import BackendError


def items(context: Context) -> Iterator[Item]:
    """One item a case; Triton's tiles for the GEMM one by one at the end."""
    for case in cases.all_cases(context.device, context.quick):
        yield Item(case.key, lambda c=case: measure(context, c), least=12.0 if case.compiled else 4.0)
    if context.device == "cuda":
        for tokens, columns, depth in ((16384, 3072, 768), (1024, 3072, 768), (16384, 4096, 1024)):
            key = f"linear tiles {tokens}x{columns}x{depth}"
            yield Item(key, lambda t=tokens, n=columns, k=depth: tiles(context, t, n, k), least=10.0)


def measure(context: Context, case: Case) -> dict[str, Any]:
    """Accuracy, then time, of every backend and peer of a case."""
    accuracy = check(case, CPU_BACKENDS if case.device == "cpu" else case.backends)
    release()
    right = [name for name, found in accuracy.items() if found.get("accurate")]
    seconds = 0.05 if context.quick else 0.5
    sets, cold = timing.input_sets(context.device, case.nbytes)
    inputs = [case.inputs(seed) for seed in range(sets)]
    candidates = {name: timing.Candidate(lambda: [case.call(case.ours, i) for i in inputs], name) for name in right}
    peers = dict(case.peers)
    if case.compiled is not None and not context.quick:
        peers["compiled"] = cases.Peer(torch.compile(case.compiled, fullgraph=True, dynamic=False))
    for name, peer in peers.items():
        candidates[name] = timing.Candidate(functools.partial(_calls, case, peer, inputs), captured=peer.captured)
    found, errors = timing.measure(context.device, candidates, seconds)
    release()
    limits = ceilings.measured(context.results)
    times = {name: describe(t, case, limits) for name, t in found.items()}
    best = min((n for n in right if n in found), key=lambda n: found[n].seconds, default=None)
    rivals = {n: t.seconds for n, t in found.items() if n in peers}
    rival = min(rivals, key=rivals.get, default=None)
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "flops": case.flops,
        "bytes": case.nbytes,
        "cold": cold,
        "accuracy": accuracy,
        "times": times,
        "errors": errors,
        "best": best,
        "best_peer": rival,
        "ratio": found[rival].seconds / found[best].seconds if best and rival else None,
        "goals": goals(case, found, best, limits) if context.device == "cuda" else [],
    }


def _calls(case: Case, peer: cases.Peer, inputs: list[tuple]) -> list[Callable[[], Any]]:
    return [case.call(peer.function, i if peer.convert is None else peer.convert(*i)) for i in inputs]


def check(case: Case, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """How far each backend is off, as shares of the largest value, and whether that is within the tests' tolerance.

    In half precision: twice the largest error of plain PyTorch in the same dtype (three times where there are
    gradients), plus two units in the last place. float32: 1e-5, times the square root of the rows for gradients.
    """
    inputs = case.inputs(0)
    wide = torch.float64 if inputs[0].numel() < 1 << 28 else torch.float32
    gold_inputs = [_widened(t, wide) for t in inputs]
    gold = case.results(case.gold, tuple(gold_inputs))
    plain = case.results(case.plain, inputs)
    factor = 2.0 if case.direction == FORWARD else 3.0
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            with backend.use(name):
                actual = case.results(case.ours, inputs)
        except BackendError as error:
            found[name] = {"refused": str(error)[:300]}
            continue
        except Exception as error:
            found[name] = {"accurate": False, "error": f"{type(error).__name__}: {error}"[:400]}
            if case.device == "cuda":
                torch.cuda.synchronize()  # raises where this process is lost
            continue
        worst = {"accurate": True, "error": 0.0, "plain_error": 0.0}
        for ours, theirs, right in zip(actual, plain, gold, strict=True):
            scale = max(right.abs().max().item(), 1e-6) if right.numel() else 1.0
            error = _error(ours, right) / scale
            limit = factor * _error(theirs, right) / scale + 2 * torch.finfo(ours.dtype).eps
            if case.dtype == "float32":
                limit = max(limit, 1e-5 * max(inputs[0].shape[0], 1) ** 0.5)
            worst["accurate"] &= error <= limit and bool(torch.isfinite(ours).all())
            worst["error"] = max(worst["error"], error)
            worst["plain_error"] = max(worst["plain_error"], _error(theirs, right) / scale)
        found[name] = worst
    return found


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def _error(actual: Tensor, gold: Tensor) -> float:
    return (actual.to(gold.dtype) - gold).abs().max().item() if gold.numel() else 0.0


def describe(t: timing.Timing, case: Case, limits: dict[str, float]) -> dict[str, Any]:
    """A timing with what it says of the machine: rates, and the share of the roofline."""
    record = {
        "microseconds": t.seconds * 1e6,
        "low": t.low * 1e6,
        "high": t.high * 1e6,
        "rounds": t.rounds,
        "how": t.how,
        "gb_per_second": case.nbytes / t.seconds / 1e9,
        "tflops": case.flops / t.seconds / 1e12,
    }
    if "copy" in limits and (not case.flops or case.dtype in limits):
        floor = max(case.nbytes / limits["copy"], case.flops / limits[case.dtype] if case.flops else 0.0)
        record["share_of_roofline"] = floor / t.seconds
    return record


def goals(
    case: Case, found: dict[str, timing.Timing], best: str | None, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """Each goal of the case with what was reached."""
    reached = []
    for what, target in case.goals.items():
        value = None
        if best is not None and what == "share of copy bandwidth" and "copy" in limits:
            value = case.nbytes / found[best].seconds / limits["copy"]
        elif best is not None and what == "against the best of sdpa":
            rivals = [t.seconds for name, t in found.items() if name.startswith("sdpa")]
            value = min(rivals) / found[best].seconds if rivals else None
        met = None if value is None else value >= target
        reached.append({"what": what, "target": target, "value": value, "met": met})
    return reached


def tiles(context: Context, tokens: int, columns: int, depth: int) -> dict[str, Any]:
    """Triton's GEMM with GELU on each of its tiles, against the one that is chosen and cuBLAS with bias_gelu."""
    from bertfast.kernels import hardware
    from bertfast.kernels import linear as kernels

    case = cases.linear(tokens, columns, depth, "gelu", "bfloat16", context.device)
    sets, _ = timing.input_sets(context.device, case.nbytes)
    inputs = [case.inputs(seed) for seed in range(sets)]
    architecture = hardware.architecture(inputs[0][0].device)
    outputs = [x.new_empty(tokens, columns) for x, _, _ in inputs]

    def run(tile: Any, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
        kernels._gemm(x, weight, bias, out, "gelu", tile)
        return out

    candidates = {
        f"{tile.rows}x{tile.columns}x{tile.depth} {tile.warps} warps {tile.stages} stages": timing.Candidate(
            lambda t=tile: [lambda i=i, o=o: run(t, *i, o) for i, o in zip(inputs, outputs, strict=True)]
        )
        for tile in kernels.TILES[max(a for a in kernels.TILES if a <= architecture)]
    }
    candidates["cuda"] = timing.Candidate(lambda: [case.call(case.ours, i) for i in inputs], "cuda")
    found, errors = timing.measure(context.device, candidates)
    chosen = kernels.choose(tokens, columns, architecture, hardware.multiprocessors(inputs[0][0].device))
    return {
        "chosen": list(chosen),
        "times": {n: describe(t, case, ceilings.measured(context.results)) for n, t in found.items()},
        "errors": errors,
    }


def release() -> None:
    """Give memory back between cases."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
