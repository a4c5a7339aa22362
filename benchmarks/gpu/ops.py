"""Phase 5: every op on every backend against PyTorch, torch.compile and its attention backends.

For each case the accuracy of each backend is checked against the specification before it is timed; one that is off is
not timed. Then all that are right, and the peers, are timed in interleaved rounds.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import lists
from benchmarks.cases.accuracy import check
from benchmarks.cases.case import Case, Peer
from benchmarks.cases.linear import projection
from benchmarks.cases.memory import release
from benchmarks.gpu import ceilings, timing
from benchmarks.gpu.plan import Context, Item


def items(context: Context) -> Iterator[Item]:
    """One item a case; Triton's tiles for the GEMM one by one at the end."""
    for case in lists.all_cases(context.device, context.quick):
        yield Item(case.key, lambda c=case: measure(context, c), least=12.0 if case.headline else 4.0)
    if context.device == "cuda":
        for tokens, columns, depth in ((16384, 3072, 768), (1024, 3072, 768), (16384, 4096, 1024)):
            key = f"linear tiles {tokens}x{columns}x{depth}"
            yield Item(key, lambda t=tokens, n=columns, k=depth: tiles(context, t, n, k), least=10.0)


def measure(context: Context, case: Case) -> dict[str, Any]:
    """Accuracy, then time, of every backend and peer of a case."""
    accuracy = check(case, case.backends, case.inputs(0))
    release()
    right = [name for name, found in accuracy.items() if found.get("accurate")]
    seconds = 0.05 if context.quick else 0.5
    sets, cold = timing.input_sets(context.device, case.nbytes)
    inputs = [case.inputs(seed) for seed in range(sets)]
    candidates = {name: timing.Candidate(lambda: [case.call(case.ours, i) for i in inputs], name) for name in right}
    peers = dict(case.peers)
    if case.headline and case.compiled is not None and not context.quick:
        peers["compiled"] = Peer(torch.compile(case.compiled, fullgraph=True, dynamic=False))
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


def _calls(case: Case, peer: Peer, inputs: list[tuple]) -> list[Callable[[], Any]]:
    return [case.call(peer.function, peer.inputs(i)) for i in inputs]


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

    case = projection(tokens, columns, depth, "gelu", "bfloat16", context.device)
    sets, _ = timing.input_sets(context.device, case.nbytes)
    inputs = [case.inputs(seed) for seed in range(sets)]
    architecture = hardware.architecture(inputs[0][0].device)
    outputs = [x.new_empty(tokens, columns) for x, *_ in inputs]

    def run(tile: Any, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kept: None) -> Tensor:
        kernels._gemm(x, weight, bias, out, "gelu", tile)
        return out

    candidates = {
        f"{tile.rows}x{tile.columns}x{tile.depth} {tile.warps} warps {tile.stages} stages": timing.Candidate(
            lambda t=tile: [lambda i=i, o=o: run(t, o, *i) for i, o in zip(inputs, outputs, strict=True)]
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
