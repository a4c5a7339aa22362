"""Kernels that each do one thing that benchmarks/static does not let pass, compiled; prints what it says, as JSON.

Run as a program of its own, as a process that interprets kernels cannot compile them.
"""

import json
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.static import baseline, capture, compilation, gates
from benchmarks.static.baseline import Key, Row


@triton.jit
def _copy_kernel(x, out, STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i * OUT_STRIDE, tl.load(x + i * STRIDE))


@triton.jit
def _softmax_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(out + i)
    tl.store(out + i, tl.exp(a - tl.max(a, 0)) * (b - tl.max(b, 0)))


@triton.jit
def _gemm_kernel(
    x, y, out, N, M: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, BREAK: tl.constexpr
):
    m, k, c = tl.arange(0, M), tl.arange(0, K), tl.arange(0, COLUMNS)
    total = tl.zeros((M, COLUMNS), tl.float32)
    for n in range(0, N, K):
        a, b = tl.load(x + m[:, None] * 4096 + (n + k)[None, :]), tl.load(y + (n + k)[:, None] * 4096 + c[None, :])
        if DOT:
            total = tl.dot(a, b, total)
        else:
            total += tl.max(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
        if BREAK:
            total = tl.exp2(total)
    tl.store(out + m[:, None] * 4096 + c[None, :], total.to(out.dtype.element_ty))


@triton.jit
def _loop_kernel(x, out, N, WORK: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(N):
        a = tl.load(x + n * BLOCK + i)
        for _ in tl.static_range(WORK):
            a = a * a + 1.0
        total += a
    tl.store(out + i, total)


def meta(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(4096, 4096, dtype=dtype, device="meta")


def made(function: Any, architecture: int, *arguments: Any, **options: Any) -> Row:
    """The kernel, launched on half precision unless it is told otherwise."""
    (kernel,) = capture.kernels(lambda: function[(1,)](*arguments, **options), architecture)
    (machine,) = compilation.compiled([kernel])
    return Row(Key("triton 1", kernel.name, "probe", architecture), machine, half=True)


def main() -> None:
    x, wide = meta(torch.bfloat16), meta(torch.float32)
    half_gemm, asked = (x, x, x, 4096), gates.Rule
    probes = {
        "nothing": (made(_copy_kernel, 90, x, x, 1, 1, 4096), asked(loads=1.0, stores=1.0, occupancy=1.0)),
        "spills": (made(_softmax_kernel, 90, wide, wide, 16384, num_warps=1), asked()),
        "narrow loads": (made(_copy_kernel, 90, x, x, 3, 1, 4096), asked(loads=0.5, stores=1.0)),
        "narrow stores": (made(_copy_kernel, 90, x, x, 1, 3, 4096), asked(loads=1.0, stores=0.5)),
        "matrix": (made(_gemm_kernel, 80, *half_gemm, 16, 16, 16, True, False), asked(matrix=True)),
        "no matrix": (made(_gemm_kernel, 80, *half_gemm, 16, 16, 16, False, False), asked(matrix=True)),
        "no bulk": (made(_gemm_kernel, 90, *half_gemm, 64, 64, 64, True, False), asked(matrix=True, bulk=True)),
        "occupancy": (made(_softmax_kernel, 90, wide, wide, 8192, num_warps=4), asked(occupancy=0.9)),
        "shared": (made(_gemm_kernel, 86, *half_gemm, 128, 64, 128, True, False, num_stages=5), asked(matrix=True)),
        "serialised": (made(_gemm_kernel, 90, *half_gemm, 128, 64, 256, True, True, num_warps=4), asked(matrix=True)),
        "does not compile": (made(_gemm_kernel, 90, *half_gemm, 16, 8, 16, True, False), asked()),
    }
    said = {
        name: gates.violations(row.machine, rule, row.key.architecture, row.half)
        for name, (row, rule) in probes.items()
    }
    short, long = (made(_loop_kernel, 90, wide, wide, 4096, work, 1024) for work in (10, 12))
    said["longer"] = baseline.regressions([long], {short.key: short.machine.as_json()}).get(long.key, [])
    said["shorter"] = baseline.regressions([short], {long.key: long.machine.as_json()}).get(short.key, [])
    print(json.dumps(said))


if __name__ == "__main__":
    main()
