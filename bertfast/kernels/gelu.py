"""bias_gelu: out = GELU(x + bias), and its gradients.

erf form:  GELU(u) = u Phi(u),               GELU'(u) = Phi(u) + u phi(u).
tanh form: GELU(u) = u s, s = sigmoid(v(u)), GELU'(u) = s + u s (1 - s) v'(u), v(u) = u (a + b u^2).

A program has a tile of the matrix. In the backward it goes down a chunk of rows, and keeps the sum of each column in
registers. Both have to keep up with the memory, which leaves about 25 instructions for an element of two bytes: hence
one exponential and one reciprocal for each, and no branches. The reciprocal is rsqrt(s s) because Triton spends four
more instructions on 1 / s than on this.
"""

import torch
import triton
import triton.language as tl

from bertfast.kernels import columns

BLOCK_COLUMNS = 256  # 16 bytes for each lane of a warp, or 32 of float32
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 4096, 2048  # of a tile: 60 to 80 KB on their way to a multiprocessor
SHORTEST_CHUNK, MOST_CHUNKS = 32, 512
WARPS = 4


@triton.jit
def _tail(a, PRECISE: tl.constexpr):
    """exp(a^2 / 2) (1 - Phi(a)) and exp(-a^2 / 2), for a >= 0: a polynomial in 1 / (1 + k a), and one exponential.

    Fitted for the least relative error, which 1 + erf would lose by cancellation: 1.7e-7 where PRECISE, and 1.9e-5
    for half precision, whose own rounding is 13 times that.
    """
    if PRECISE:
        s = a * 0.31 + 1.0
        t = tl.rsqrt(s * s)
        p = t * 0.0358403623 - 0.141599298
        p = p * t + 0.155059502
        p = p * t - 0.0148964515
        p = p * t + 0.110106871
        p = p * t + 0.107771963
        p = p * t + 0.124060221
        p = p * t + 0.123656914
    else:
        s = a * 0.37 + 1.0
        t = tl.rsqrt(s * s)
        p = t * -0.0930249397 + 0.216123811
        p = p * t + 0.0711042254
        p = p * t + 0.159062278
        p = p * t + 0.146725338
    return p * t, tl.exp2(a * a * -0.721347520)  # log2(e) / 2


@triton.jit
def _magnitude(u):
    """min(|u|, 20): the tail's exponential is 0 there, and infinity times it would be NaN. NaN stays what it is."""
    return tl.minimum(tl.abs(u), 20.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sigmoid(u):
    """s = sigmoid(v(u)) = 1 / (1 + e) and e = exp(-v(u)): 1 - s is s e, without cancellation."""
    # 2 sqrt(2 / pi) and 0.044715 times that, both times log2(e)
    exponential = tl.exp2(u * (u * u * -0.102943240 - 2.30220819))
    s = 1.0 + exponential
    return tl.rsqrt(s * s), exponential


@triton.jit
def gelu(u, TANH: tl.constexpr, PRECISE: tl.constexpr):
    """GELU(u), float32. PRECISE: to float32's precision, not only to that of half precision."""
    if TANH:
        s, _ = _sigmoid(u)
        return u * s
    # By symmetry: GELU(u) = max(u, 0) - |u| (1 - Phi(|u|)).
    a = _magnitude(u)
    p, exponential = _tail(a, PRECISE)
    return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * p * exponential


@triton.jit
def gelu_derivative(u, TANH: tl.constexpr, PRECISE: tl.constexpr):
    """GELU'(u), float32."""
    if TANH:
        # Beyond 10 the sigmoid is 0 or 1 in any precision, and u^2 must not overflow.
        v = tl.minimum(u, 10.0, propagate_nan=tl.PropagateNan.ALL)
        v = tl.maximum(v, -10.0, propagate_nan=tl.PropagateNan.ALL)
        s, exponential = _sigmoid(v)
        return s + v * (s * exponential) * s * (v * v * 0.214064488 + 1.59576912)
    # GELU'(-a) = 1 - Phi(a) - a phi(a) = 1 - GELU'(a)
    a = _magnitude(u)
    p, exponential = _tail(a, PRECISE)
    left = (a * -0.398942280 + p) * exponential  # 1 / sqrt(2 pi)
    return tl.where(u < 0.0, left, 1.0 - left)


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_fwd_kernel(
    x,  # (rows, COLUMNS)
    bias,  # (COLUMNS,) or None
    out,  # (rows, COLUMNS)
    rows,
    COLUMNS: tl.constexpr,
    TANH: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    across: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tile = tl.program_id(0)
    begin = (tile // across).to(tl.int64) * BLOCK_ROWS
    row, column = tl.arange(0, BLOCK_ROWS), (tile % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    place = row[:, None] * COLUMNS + column[None, :]
    inside = (row < rows - begin)[:, None] & (column < COLUMNS)[None, :]
    u = tl.load(x + begin * COLUMNS + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        u += tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    y = gelu(u, TANH, PRECISE)
    tl.store(out + begin * COLUMNS + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "length"])
def _bias_gelu_bwd_kernel(
    dout,  # (rows, COLUMNS)
    x,  # (rows, COLUMNS)
    bias,  # (COLUMNS,) or None
    dx,  # (rows, COLUMNS)
    workspace,  # (chunks, COLUMNS) float32: the sums of dx over the rows of each chunk; None without bias
    rows,
    length,  # the rows of a chunk
    COLUMNS: tl.constexpr,
    TANH: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    across: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    chunk = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.arange(0, BLOCK_ROWS)
    place = row[:, None] * COLUMNS + column[None, :]
    if bias is not None:
        b = tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(0, length, BLOCK_ROWS):
        begin = chunk * length + step
        inside = (row < rows - begin)[:, None] & (column < COLUMNS)[None, :]
        u = tl.load(x + begin * COLUMNS + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dout + begin * COLUMNS + place, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            u += b
        g *= gelu_derivative(u, TANH, PRECISE)
        tl.store(dx + begin * COLUMNS + place, g.to(dx.dtype.element_ty), mask=inside)
        sums += g
    if workspace is not None:
        tl.store(workspace + chunk * COLUMNS + column, tl.sum(sums, 0), mask=column < COLUMNS)


def _tile(x: torch.Tensor, elements: int) -> tuple[int, int]:
    """The rows and columns of a program's tile: few columns leave room for more rows."""
    across = min(BLOCK_COLUMNS, max(16, triton.next_power_of_2(x.shape[1])))
    return elements // across, across


def bias_gelu_fwd(x, bias, approximate):
    """GELU(x + bias), (tokens, features)."""
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty_like(x)
    (rows, features), (block_rows, block_columns) = x.shape, _tile(x, FORWARD_ELEMENTS)
    grid = (triton.cdiv(rows, block_rows) * triton.cdiv(features, block_columns),)
    _bias_gelu_fwd_kernel[grid](
        *(x, bias, out, rows, features),
        TANH=approximate == "tanh",
        PRECISE=x.dtype == torch.float32,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=WARPS,
    )
    return out


def bias_gelu_bwd(dout, x, bias, approximate):
    """The gradients of (x, bias), the latter empty where there is no bias."""
    dout, x = dout.contiguous(), x.contiguous()
    bias = None if bias is None else bias.contiguous()
    dx, dbias = torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)
    (rows, features), (block_rows, block_columns) = x.shape, _tile(x, BACKWARD_ELEMENTS)
    length = columns.chunk_length(rows, max(SHORTEST_CHUNK, block_rows), MOST_CHUNKS)
    sums = None if bias is None else columns.workspace(x, length, 1)
    grid = (triton.cdiv(rows, length) * triton.cdiv(features, block_columns),)
    _bias_gelu_bwd_kernel[grid](
        *(dout, x, bias, dx, sums, rows, length, features),
        TANH=approximate == "tanh",
        PRECISE=x.dtype == torch.float32,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=WARPS,
    )
    if bias is not None:
        columns.add_chunks(sums, dbias)
    return dx, dbias
