"""Phase 3: what this card can do at best, for everything else to be measured against.

The bandwidth of a device copy, bytes read plus bytes written, and the rate of the library's GEMM on random data, at the
shapes of BERT-base and -large and at one that fills any card.
"""

from collections.abc import Iterator

from benchmarks.ceilings import CUBE, DTYPES, GEMMS, copy, gemm
from benchmarks.gpu.plan import Context, Item
from benchmarks.gpu.results import Results


def items(context: Context) -> Iterator[Item]:
    """The copy, then the GEMMs, half precision first."""
    device = context.device
    yield Item("copy", lambda: copy(device, (8 << 20) if context.quick else (2 << 30)))
    tokens, cube = (64, 64) if context.quick else (16384, CUBE)
    for dtype in ("bfloat16", "float32") if context.quick else DTYPES:
        yield Item(f"gemm {dtype} cube", lambda d=dtype: gemm(device, d, cube, cube, cube))
        for model, shapes in GEMMS.items():
            for name, (n, k) in shapes.items():
                key = f"gemm {dtype} {model} {name} {tokens}x{n}x{k}"
                if context.quick and (model != "base" or name != "out"):
                    continue
                yield Item(key, lambda d=dtype, n=n, k=k: gemm(device, d, tokens, n, k))
    if device == "cuda":
        yield Item("gemm tf32 cube", lambda: gemm(device, "float32", cube, cube, cube, "high"))


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
