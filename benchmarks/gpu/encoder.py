"""Phase 6: whole encoders and training steps, patched against stock and against torch.compile of stock.

Random weights, built from the configuration. Every row is a run of its own in interleaved rounds: the time on the wall
of a call with the wait for its end, and the time that the GPU was at work in it, from PyTorch's profiler.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

import bertfast
from benchmarks import accuracy, harness, models, roofline, training
from benchmarks.gpu.plan import Context, Item
from benchmarks.peers import PEERS, Setting
from benchmarks.workloads import Batch, Workload, ragged_lengths
from bertfast import measure

# Who stands behind the names of the rows. Both in training, too.
STOCK, OURS, COMPILED = "hf-sdpa", "bertfast", "compile-max-autotune"


@dataclass(frozen=True)
class Row:
    """A batch on a model, and the goals: least ratios to stock and to compiled, of "wall" or "gpu" time."""

    name: str
    model: str
    lengths: tuple[int, ...]
    training: bool = False
    goals: dict[tuple[str, str], float] = field(default_factory=dict)


def _goals(eager: float, compiled: float, time_: str = "wall") -> dict[tuple[str, str], float]:
    return {("stock", time_): eager, ("compiled", "wall"): compiled}


ROWS = (
    Row("base b32 s128", "base", (128,) * 32, goals=_goals(1.35, 1.25, "gpu")),
    Row("base b64 s512 40% filled", "base", ragged_lengths(64, 512, 0.4), goals=_goals(3.2, 2.9)),
    Row("base b1 s128", "base", (128,), goals=_goals(10, 1.8)),
    Row("training base b32 s512", "base", (512,) * 32, True, goals=_goals(1.75, 1.5)),
    Row("base b8 s128", "base", (128,) * 8, goals=_goals(6, 1.4)),
    Row("base b32 s512", "base", (512,) * 32, goals=_goals(1.25, 1.2)),
    Row("training base b256 s128", "base", (128,) * 256, True, goals=_goals(1.85, 1.55)),
    Row("minilm b256 s64 half filled", "minilm", ragged_lengths(256, 64, 0.5), goals=_goals(4, 2.5)),
    Row("large b32 s384", "large", (384,) * 32, goals=_goals(1.2, 1.15)),
    Row("training base b32 s512 40% filled", "base", ragged_lengths(32, 512, 0.4), True, goals=_goals(4, 3.3)),
)
QUICK = (Row("tiny b3 s9", "tiny", (9, 4, 1)), Row("training tiny b3 s9", "tiny", (9, 4, 1), True))


def items(context: Context) -> Iterator[Item]:
    """Every row against stock, then every row against torch.compile, which takes a minute to tune each."""
    rows = QUICK if context.quick else ROWS
    for row in rows:
        yield Item(row.name, lambda r=row: compare(context, r, "stock"), least=10 if context.device == "cuda" else 2)
    if context.device == "cuda" and not context.quick:
        for row in rows:
            yield Item(f"{row.name} against compiled", lambda r=row: compare(context, r, "compiled"), least=30)


def compare(context: Context, row: Row, peer: str) -> dict[str, Any]:
    """Accuracy, then both times, of a row."""
    gc.collect()
    workload = Workload(row.name, row.lengths, training=row.training)
    stock = models.random(row.model, "pretraining" if row.training else "")
    (batch,) = workload.batches()
    batch = {name: tensor.to(context.device) for name, tensor in batch.items()}
    names = {peer: COMPILED if peer == "compiled" else STOCK, "bertfast": OURS}
    prepare = _training if row.training else _inference
    calls, errors = prepare(context, stock, batch, names)
    for call in calls.values():
        for _ in range(3 if context.device == "cuda" else 1):
            harness.one_call(call, context.device)
    seconds, least = (0.1, 2) if context.quick else (4.0, 7)
    found = harness.timed(calls, context.device, seconds, least)
    wall = {name: measure.Summary.of(t) for name, t in found.seconds.items()}
    ratio = measure.Ratio.of(found.seconds[peer], found.seconds["bertfast"])
    gpu = {name: harness.busy(call) for name, call in calls.items()} if context.device == "cuda" else {}
    ratios = {"wall": ratio.value}
    if gpu:
        ratios["gpu"] = gpu[peer]["milliseconds"] / max(gpu["bertfast"]["milliseconds"], 1e-9)
    return {
        "row": row.name,
        "peer": peer,
        "dtype": _precision(context),
        "tokens": workload.tokens,
        "fill": workload.fill,
        "wall_milliseconds": {
            n: {"median": 1e3 * s.median, "low": 1e3 * s.low, "high": 1e3 * s.high, "n": s.n} for n, s in wall.items()
        },
        "gpu": gpu,
        "ratios": ratios,
        "interval": [ratio.low, ratio.high],
        "noise": found.noise.to_dict(),
        "sequences_per_second": len(row.lengths) / wall["bertfast"].median,
        "accuracy": _accuracy(errors, peer, row),
        "backends": _backends(context),
        "goals": [
            {
                "what": f"{time_} time against {against}",
                "target": target,
                "value": ratios[time_],
                "met": ratios[time_] >= target,
            }
            for (against, time_), target in row.goals.items()
            if against == peer and time_ in ratios
        ],
    }


def _precision(context: Context) -> str:
    return "bfloat16" if context.device == "cuda" else "float32"


Prepared = tuple[dict[str, Callable[[], Any]], dict[str, dict[str, float]]]  # calls and errors by name


def _inference(context: Context, stock: nn.Module, batch: Batch, names: Mapping[str, str]) -> Prepared:
    """A forward of each peer."""
    lengths = batch["attention_mask"].sum(1).tolist()
    work = sum(step.flops for step in roofline.forward(stock.config, lengths, "float32"))
    right = accuracy.gold(stock, [batch], "", accuracy.wide(work))
    setting = Setting(stock, "", _precision(context), context.device, batch, torch.get_num_threads())
    calls = {name: partial(PEERS[who].prepare(setting), batch) for name, who in names.items()}
    return calls, {name: accuracy.errors(right, [call()], [batch]) for name, call in calls.items()}


def _training(context: Context, stock: nn.Module, batch: Batch, names: Mapping[str, str]) -> Prepared:
    """A training step of each peer, under bfloat16 autocast, dropout on."""
    batch = training.labelled(batch)
    setting = Setting(stock, "pretraining", "bfloat16", context.device, batch, torch.get_num_threads())
    right = training.gold(stock, batch, torch.float32)
    calls, errors = {}, {}
    for name, who in names.items():
        model = PEERS[who].trainable(setting)
        errors[name] = training.errors(right, training.gradients(model, batch, "bfloat16"))
        calls[name] = training.step(model, batch, "bfloat16")
    return calls, errors


def _accuracy(errors: Mapping[str, dict[str, float]], peer: str, row: Row) -> dict[str, Any]:
    """The errors, and whether ours is at most three times the other's."""
    other, ours = errors[peer], errors["bertfast"]
    slack = (
        0.1 if row.training else 1e-5
    )  # where the other is right by luck: a hundredth of the loss, float32's rounding
    right = ours["max"] <= 3 * other["max"] + slack and 1 - ours["cosine"] <= 3 * (1 - other["cosine"]) + 1e-3
    return {"errors": dict(errors), "accurate": right}


def _backends(context: Context) -> dict[str, str]:
    """What runs each op."""
    names = ("embed_layer_norm", "varlen_attention", "bias_gelu", "residual_layer_norm", "linear")
    dtype = getattr(torch, _precision(context))
    device = torch.device(context.device, 0) if context.device == "cuda" else torch.device("cpu")
    return {name: bertfast.backend.explain(name, device, dtype).backend for name in names}
