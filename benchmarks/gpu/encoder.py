"""Phase 6: whole encoders and training steps, patched against stock and against torch.compile of stock.

Random weights, built from the configuration. Every row is a run of its own in interleaved rounds: the time on the wall
of a call with the wait for its end, and the time that the GPU was at work in it, from PyTorch's profiler.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import bertfast
from benchmarks.gpu.plan import Context, Item
from benchmarks.workloads import Workload, ragged_lengths
from bertfast import measure

MODELS = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}
MASKED = 0.15  # of the tokens carry a label


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
    torch.manual_seed(0)
    gc.collect()
    batch = {k: v.to(context.device) for k, v in Workload(row.name, row.model, row.lengths).batch().items()}
    prepare = _training if row.training else _inference
    stock, ours, accuracy = prepare(context, row, batch)
    if peer == "compiled":
        mode = "max-autotune-no-cudagraphs" if row.training else "max-autotune"
        stock = _compiled(stock, row, batch, context, mode)
    calls = {peer: stock, "bertfast": ours}
    waiting = {name: (lambda call=call: _wait(context, call)) for name, call in calls.items()}
    seconds, least = (0.1, 2) if context.quick else (4.0, 7)
    times = measure.interleave(waiting, seconds=seconds, warmup=3 if context.device == "cuda" else 1)
    if len(times[peer]) < least:
        for name, more in measure.interleave(waiting, rounds=least - len(times[peer]), warmup=0).items():
            times[name] += more
    wall = {name: measure.Summary.of(t) for name, t in times.items()}
    ratio = measure.Ratio.of(times[peer], times["bertfast"])
    gpu = {name: busy(call) for name, call in calls.items()} if context.device == "cuda" else {}
    ratios = {"wall": ratio.value}
    if gpu:
        ratios["gpu"] = gpu[peer]["milliseconds"] / max(gpu["bertfast"]["milliseconds"], 1e-9)
    tokens = sum(row.lengths)
    return {
        "row": row.name,
        "peer": peer,
        "dtype": str(_dtype(context)).removeprefix("torch."),
        "tokens": tokens,
        "fill": tokens / (len(row.lengths) * max(row.lengths)),
        "wall_milliseconds": {
            n: {"median": 1e3 * s.median, "low": 1e3 * s.low, "high": 1e3 * s.high, "n": s.n} for n, s in wall.items()
        },
        "gpu": gpu,
        "ratios": ratios,
        "interval": [ratio.low, ratio.high],
        "sequences_per_second": len(row.lengths) / wall["bertfast"].median,
        "accuracy": accuracy,
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


def _dtype(context: Context) -> torch.dtype:
    return torch.bfloat16 if context.device == "cuda" else torch.float32


def _inference(context: Context, row: Row, batch: dict) -> tuple[Callable, Callable, dict]:
    from transformers import BertConfig, BertModel

    stock = BertModel(BertConfig(attn_implementation="sdpa", **MODELS[row.model]))
    stock = stock.eval().to(context.device, _dtype(context))
    ours = bertfast.patch(copy.deepcopy(stock))
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        gold = copy.deepcopy(stock).double()(**batch).last_hidden_state[valid]
        accuracy = {
            name: (model(**batch).last_hidden_state[valid].double() - gold).abs().max().item()
            for name, model in (("stock", stock), ("bertfast", ours))
        }
    del gold
    accuracy["accurate"] = accuracy["bertfast"] <= 3 * accuracy["stock"] + 1e-5
    return _forward(stock, batch), _forward(ours, batch), accuracy


def _forward(model: Callable, batch: dict) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Any:
        return model(**batch)

    call.model = model
    return call


def _training(context: Context, row: Row, batch: dict) -> tuple[Callable, Callable, dict]:
    from transformers import BertConfig, BertForMaskedLM

    stock = BertForMaskedLM(BertConfig(attn_implementation="sdpa", **MODELS[row.model])).to(context.device)
    ours = bertfast.patch(copy.deepcopy(stock))
    generator = torch.Generator(context.device).manual_seed(1)
    drawn = torch.rand(batch["input_ids"].shape, generator=generator, device=context.device)
    labelled = (drawn < MASKED) & batch["attention_mask"].bool()
    labelled[:, 0] = True  # no batch without a label
    batch["labels"] = torch.where(labelled, batch["input_ids"], -100)
    accuracy = {}
    with torch.no_grad():
        gold = stock.eval()(**batch).loss.double().item()
        with torch.autocast(context.device, dtype=torch.bfloat16):
            for name, model in (("stock", stock), ("bertfast", ours)):
                accuracy[name] = abs(model.eval()(**batch).loss.double().item() - gold)
    accuracy["accurate"] = accuracy["bertfast"] <= 3 * accuracy["stock"] + 0.01 * abs(gold)
    return _step(stock.train(), batch, context), _step(ours.train(), batch, context), accuracy


def _step(model: torch.nn.Module, batch: dict, context: Context, call: Callable | None = None) -> Callable[[], Any]:
    """Forward, backward and AdamW under bfloat16 autocast, dropout on. call: runs the model, where it is not itself."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=context.device == "cuda")
    forward = call or model

    def step() -> Any:
        with torch.autocast(context.device, dtype=torch.bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    step.model = model
    return step


def _compiled(stock: Any, row: Row, batch: dict, context: Context, mode: str) -> Callable[[], Any]:
    torch._dynamo.reset()
    compiled = torch.compile(stock.model, mode=mode)
    return _step(stock.model, batch, context, compiled) if row.training else _forward(compiled, batch)


def _wait(context: Context, call: Callable[[], Any]) -> None:
    call()
    if context.device == "cuda":
        torch.cuda.synchronize()


def busy(call: Callable[[], Any], times: int = 3) -> dict[str, Any]:
    """Milliseconds of kernels in a call, how many there are, and the longest."""
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


def _backends(context: Context) -> dict[str, str]:
    """What runs each op."""
    names = ("embed_layer_norm", "varlen_attention", "bias_gelu", "residual_layer_norm", "linear")
    device = torch.device(context.device, 0) if context.device == "cuda" else torch.device("cpu")
    return {name: bertfast.backend.explain(name, device, _dtype(context)).backend for name in names}
