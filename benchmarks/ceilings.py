"""What the machine in hand can do at best: the bandwidth of its memory, and the best GEMM's rate in each precision.

GEMMs are those of BERT's layers on random data. On a CPU every library that PyTorch brings is tried: `F.linear`, oneDNN
on weights packed once, and for int8 its quantised linear; and bertfast's own GEMM, so that no share of a ceiling is
large because the ceiling is low.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import timing
from bertfast import native
from bertfast.ops.packed import OPERANDS, Packed

# (out_features, in_features) of the four GEMMs of a layer: query-key-value, attention output, up, down.
GEMMS = {
    "base": {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)},
    "large": {"qkv": (3072, 1024), "out": (1024, 1024), "up": (4096, 1024), "down": (1024, 4096)},
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CUBE = 8192  # a GEMM of this size fills any card
_ROWS = 1024  # tokens of the GEMMs on a CPU
_COPY = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes: more than any cache

Call = Callable[[], Any]


def measured(device: str, seconds: float = 0.5) -> dict[str, float]:
    """The ceilings: "copy" and "read" in bytes a second, each precision in operations a second.

    seconds: for each of the GEMMs, of which a CPU has two shapes a precision.
    """
    found = {"copy": copy(device, _COPY[device])["bytes_per_second"], "read": _read(device, _COPY[device])}
    for dtype in ("float32", "bfloat16") if device == "cpu" else DTYPES:
        found[dtype] = max(gemm(device, dtype, *shape, seconds=seconds)["flops"] for shape in _shapes(device))
    if device == "cpu" and torch.backends.mkldnn.is_available():
        found["int8"] = max(_int8(*shape, seconds) for shape in _shapes(device))
    return found


def _shapes(device: str) -> list[tuple[int, int, int]]:
    """(rows, columns, depth) of the GEMMs that a ceiling is the best of."""
    if device == "cuda":
        return [(CUBE, CUBE, CUBE)]
    return [(_ROWS, *GEMMS["base"][name]) for name in ("up", "down")]


def copy(device: str, size: int) -> dict[str, Any]:
    """GB/s of a copy within the device's memory, bytes read plus bytes written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    found = _best(device, {"copy": timing.Candidate(lambda: [lambda: target.copy_(source)])})
    rate = 2 * size / found.seconds
    return {"bytes_per_second": rate, "gb_per_second": rate / 1e9, "timing": found._asdict()}


def _read(device: str, size: int) -> float:
    """Bytes a second of a sum: what reads weights and writes next to nothing may be faster than a copy."""
    source = torch.ones(size // 4, device=device)
    return size / _best(device, {"read": timing.Candidate(lambda: [lambda: source.sum()])}).seconds


def gemm(
    device: str, dtype: str, rows: int, columns: int, depth: int, precision: str = "highest", seconds: float = 0.3
) -> dict[str, Any]:
    """TFLOP/s of x W^T by the fastest library, or by our own on a CPU."""
    kind = DTYPES[dtype]
    element = torch.empty((), dtype=kind).element_size()
    sets, cold = timing.input_sets(device, (rows * depth + columns * depth + rows * columns) * element)
    pairs = [(random(rows, depth, kind, device), random(columns, depth, kind, device)) for _ in range(sets)]
    candidates = {
        "library": timing.Candidate(lambda: [lambda x=x, w=w: torch.nn.functional.linear(x, w) for x, w in pairs])
    }
    if device == "cpu" and torch.backends.mkldnn.is_available():
        candidates["onednn packed"] = timing.Candidate(lambda: list(_packed(pairs)))
    if device == "cpu" and native.cpu is not None and dtype in OPERANDS:
        candidates["bertfast packed"] = timing.Candidate(lambda: list(_packed_by_us(dtype, pairs)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = _best(device, candidates, seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    rate = 2 * rows * columns * depth / found.seconds
    return {"flops": rate, "tflops": rate / 1e12, "cold": cold, "timing": found._asdict()}


def _packed(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[Call]:
    for x, weight in pairs:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        yield lambda x=x, w=packed: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def _packed_by_us(dtype: str, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[Call]:
    for x, weight in pairs:
        packed = Packed.of(dtype, [weight], [])
        yield lambda x=x, packed=packed: packed.linear(x, "none")


def _int8(rows: int, columns: int, depth: int, seconds: float) -> float:
    """Operations a second of unsigned 8-bit activations on signed 8-bit weights, quantised again at the end."""
    x = torch.randint(0, 256, (rows, depth), dtype=torch.uint8)
    weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)

    def calls() -> list[Call]:
        packed = torch.ops.onednn.qlinear_prepack(weight, [rows, depth])
        scales, zeros = torch.full((columns,), 0.01), torch.zeros(columns, dtype=torch.int64)
        inputs = (x, 0.01, 128, packed, scales, zeros, None, 0.1, 128, torch.uint8, "none", [], "")
        return [lambda: torch.ops.onednn.qlinear_pointwise(*inputs)]

    return 2 * rows * columns * depth / _best("cpu", {"onednn": timing.Candidate(calls)}, seconds).seconds


def _best(device: str, candidates: dict[str, timing.Candidate], seconds: float = 0.5) -> timing.Timing:
    """The timing of the fastest. RuntimeError where none ran."""
    found, errors = timing.measure(device, candidates, seconds)
    if not found:
        raise RuntimeError("; ".join(errors.values()))
    return min(found.values(), key=lambda t: t.seconds)


def random(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal random numbers: on zeros a GPU is faster, because it draws less power."""
    return torch.randn(rows, columns, dtype=dtype, device=device)
