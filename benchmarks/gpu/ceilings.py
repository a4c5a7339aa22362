"""Phase 3: what this card can do at best, for everything else to be measured against.

The bandwidth of a device copy, bytes read plus bytes written, and the rate of the library's GEMM on random data, at the
shapes of BERT-base and -large and at one that fills any card.
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.plan import Context, Item
from benchmarks.gpu.results import Results

# (out_features, in_features) of the four GEMMs of a layer: query-key-value, attention output, up, down.
GEMMS = {
    "base": {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)},
    "large": {"qkv": (3072, 1024), "out": (1024, 1024), "up": (4096, 1024), "down": (1024, 4096)},
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def items(context: Context) -> Iterator[Item]:
    """The copy, then the GEMMs, half precision first."""
    yield Item("copy", lambda: copy(context))
    tokens, cube = (64, 64) if context.quick else (16384, 8192)
    for dtype in ("bfloat16", "float32") if context.quick else DTYPES:
        yield Item(f"gemm {dtype} cube", lambda d=dtype: gemm(context, d, cube, cube, cube))
        for model, shapes in GEMMS.items():
            for name, (n, k) in shapes.items():
                key = f"gemm {dtype} {model} {name} {tokens}x{n}x{k}"
                if context.quick and (model != "base" or name != "out"):
                    continue
                yield Item(key, lambda d=dtype, n=n, k=k: gemm(context, d, tokens, n, k))
    if context.device == "cuda":
        yield Item("gemm tf32 cube", lambda: gemm(context, "float32", cube, cube, cube, "high"))


def copy(context: Context) -> dict[str, Any]:
    """GB/s of a copy within the device's memory."""
    size = (8 << 20) if context.quick else (2 << 30)
    source = torch.empty(size, dtype=torch.uint8, device=context.device).random_()
    target = torch.empty_like(source)
    found, errors = timing.measure(context.device, {"copy": timing.Candidate(lambda: [lambda: target.copy_(source)])})
    if errors:
        raise RuntimeError(errors["copy"])
    rate = 2 * size / found["copy"].seconds
    return {"bytes_per_second": rate, "gb_per_second": rate / 1e9, "timing": found["copy"]._asdict()}


def gemm(context: Context, dtype: str, rows: int, columns: int, depth: int, precision: str = "highest") -> dict:
    """TFLOP/s of x W^T."""
    kind = DTYPES[dtype]
    element = torch.empty((), dtype=kind).element_size()
    sets, cold = timing.input_sets(context.device, (rows * depth + columns * depth + rows * columns) * element)

    def calls() -> list:
        pairs = [(random(rows, depth, kind, context), random(columns, depth, kind, context)) for _ in range(sets)]
        return [lambda x=x, w=w: torch.nn.functional.linear(x, w) for x, w in pairs]

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found, errors = timing.measure(context.device, {"gemm": timing.Candidate(calls)}, seconds=0.3)
    finally:
        torch.set_float32_matmul_precision(before)
    if errors:
        raise RuntimeError(errors["gemm"])
    rate = 2 * rows * columns * depth / found["gemm"].seconds
    return {"flops": rate, "tflops": rate / 1e12, "cold": cold, "timing": found["gemm"]._asdict()}


def random(rows: int, columns: int, dtype: torch.dtype, context: Context) -> torch.Tensor:
    """Normal random numbers: on zeros a GPU is faster, because it draws less power."""
    return torch.randn(rows, columns, dtype=dtype, device=context.device)


def measured(results: Results) -> dict[str, float]:
    """The ceilings in these results: "copy" in bytes a second, each dtype in FLOP/s; only those that were measured."""
    found: dict[str, float] = {}
    for record in results.read("ceilings"):
        if record.get("status") != "done":
            continue
        if record["key"] == "copy":
            found["copy"] = record["bytes_per_second"]
        else:
            dtype = record["key"].split()[1]
            found[dtype] = max(found.get(dtype, 0.0), record["flops"])
    return found
