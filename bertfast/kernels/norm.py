"""residual_layer_norm: out = LayerNorm(dropout(x + x_bias) + residual), and its gradients.

A program has a few rows at a time, each over the whole width of its warps, which keep them in registers between the
one read and the one write: the mean, then the variance around it, then the result. It takes one tile of rows after
another, the next one on its way while one is computed, and what belongs to the columns stays with it: the vectors of
the forward, and the sums of the backward, whose programs go down chunks of neighbouring rows.

The backward makes the normalised row again from what the forward read and from the mean and the reciprocal standard
deviation it kept. With xhat that row and g = dout * weight: dresidual = (g - mean(g) - xhat mean(g xhat)) rstd.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bertfast.kernels import columns, dropout, hardware
from bertfast.ops import registry

SHORTEST_CHUNK = 16  # the sums of a chunk are written once: an eighth of its bytes, or less


class Tile(NamedTuple):
    """The rows that a program has at a time, and how it is compiled."""

    rows: int
    columns: int  # at least those of a row
    warps: int


# By the columns of a tile: 256 to a warp, and none with rows of its own, so that sums over a few rows need no other
# warp. 16 elements to a thread, and less in wider rows, fill no more registers than there are.
TILES = {
    128: Tile(4, 128, 1),
    256: Tile(4, 256, 1),
    512: Tile(2, 512, 2),
    1024: Tile(2, 1024, 4),
    2048: Tile(1, 2048, 8),
    4096: Tile(1, 4096, 16),
}


def tile(hidden: int) -> Tile:
    """The narrowest that has room for a row. `bertfast.ops.norm` refuses rows that are wider than all of them."""
    return TILES[max(128, triton.next_power_of_2(hidden))]


def programs(device: torch.device, block: Tile, rows: int) -> int:
    """As many programs as the multiprocessors hold at once, 24 warps each, or fewer where there are fewer tiles."""
    return min(triton.cdiv(rows, block.rows), hardware.multiprocessors(device) * max(1, 24 // block.warps))


def chunk_length(rows: int, block: Tile) -> int:
    """The rows that a program of the backward sums: chunks enough for 16 warps on each of 128 multiprocessors."""
    return columns.chunk_length(rows, SHORTEST_CHUNK, 2048 // block.warps)


def statistics(x: torch.Tensor, rows: int, save: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for the mean and the reciprocal standard deviation of each row, where the backward will want them."""
    if not save:
        return None, None
    return tuple(torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))


@triton.jit
def load_vector(vector, column, COLUMNS: tl.constexpr):
    """(1, BLOCK) float32 of a vector (COLUMNS,)."""
    return tl.load(vector + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalise(y, column, eps, COLUMNS: tl.constexpr):
    """xhat, mean and 1 / sqrt(var + eps) of the rows y, (rows, BLOCK) float32 with 0 behind the columns.

    The mean is divided exactly: a constant row has to become 0, not its rounding error over sqrt(eps).
    """
    mean = tl.div_rn(tl.sum(y, 1), COLUMNS * 1.0)
    centred = tl.where((column < COLUMNS)[None, :], y - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / COLUMNS) + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def normalise_backward(g, xhat, rstd, COLUMNS: tl.constexpr):
    """The gradient of the rows of a norm from that of xhat, g = dout * weight, which is 0 behind the columns."""
    along = tl.sum(g * xhat, 1) * (1.0 / COLUMNS)
    constant = tl.sum(g, 1) * (1.0 / COLUMNS)
    return (g - constant[:, None] - xhat * along[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=["rows", "threshold"])
def _residual_layer_norm_fwd_kernel(
    x,  # (rows, COLUMNS)
    residual,  # (rows, COLUMNS)
    weight,  # (COLUMNS,)
    bias,  # (COLUMNS,)
    x_bias,  # (COLUMNS,) or None
    seed,  # (1,) int64, or None where nothing is dropped
    out,  # (rows, COLUMNS)
    mean,  # (rows,) float32, or None where the backward will not want them
    rstd,
    rows,
    eps,
    threshold,  # of dropout, and what the kept elements are multiplied by
    scale,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    place = row[:, None] * COLUMNS + column[None, :]
    gamma, beta = load_vector(weight, column, COLUMNS), load_vector(bias, column, COLUMNS)
    if x_bias is not None:
        added = load_vector(x_bias, column, COLUMNS)
    if seed is not None:
        key = tl.load(seed)
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=2):
        begin = tl.cast(tile, tl.int64) * BLOCK_ROWS
        exists = row < rows - begin
        inside = exists[:, None] & (column < COLUMNS)[None, :]
        y = tl.load(x + begin * COLUMNS + place, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(residual + begin * COLUMNS + place, mask=inside, other=0.0).to(tl.float32)
        if x_bias is not None:
            y += added
        if seed is not None:
            y *= dropout.row_multiplier(
                key, threshold, scale, begin + row, BLOCK, 128 // x.dtype.element_ty.primitive_bitwidth
            )
        xhat, m, s = normalise(y + r, column, eps, COLUMNS)
        y = xhat * gamma + beta
        tl.store(out + begin * COLUMNS + place, y.to(out.dtype.element_ty), mask=inside)
        if mean is not None:
            tl.store(mean + begin + row, m, mask=exists)
            tl.store(rstd + begin + row, s, mask=exists)


@triton.jit(do_not_specialize=["rows", "length", "threshold"])
def _residual_layer_norm_bwd_kernel(
    dout,  # (rows, COLUMNS)
    x,  # (rows, COLUMNS)
    residual,  # (rows, COLUMNS)
    weight,  # (COLUMNS,)
    x_bias,  # (COLUMNS,) or None
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    seed,  # (1,) int64, or None where nothing is dropped
    dx,  # (rows, COLUMNS), or None where nothing is dropped: it is dresidual then
    dresidual,  # (rows, COLUMNS)
    workspace,  # (2 or 3, chunks, COLUMNS) float32: the sums of dweight, dbias and, with x_bias, dx_bias
    rows,
    length,  # the rows of a chunk
    threshold,  # of dropout, and what the kept elements are multiplied by
    scale,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    place = row[:, None] * COLUMNS + column[None, :]
    gamma = load_vector(weight, column, COLUMNS)
    if x_bias is not None:
        added = load_vector(x_bias, column, COLUMNS)
        dx_sums = tl.zeros((BLOCK,), tl.float32)
    if seed is not None:
        key = tl.load(seed)
    dweight, dbias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    chunk = tl.program_id(0).to(tl.int64)
    for step in tl.range(0, length, BLOCK_ROWS, num_stages=2):
        begin = chunk * length + step
        exists = row < rows - begin
        inside = exists[:, None] & (column < COLUMNS)[None, :]
        g = tl.load(dout + begin * COLUMNS + place, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(x + begin * COLUMNS + place, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(residual + begin * COLUMNS + place, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + begin + row, mask=exists, other=0.0)
        s = tl.load(rstd + begin + row, mask=exists, other=0.0)
        if x_bias is not None:
            y += added
        if seed is not None:
            multiplier = dropout.row_multiplier(
                key, threshold, scale, begin + row, BLOCK, 128 // x.dtype.element_ty.primitive_bitwidth
            )
            y *= multiplier
        xhat = (y + r - m[:, None]) * s[:, None]
        dweight += tl.sum(g * xhat, 0)
        dbias += tl.sum(g, 0)
        dy = normalise_backward(g * gamma, xhat, s, COLUMNS)
        tl.store(dresidual + begin * COLUMNS + place, dy.to(dresidual.dtype.element_ty), mask=inside)
        if seed is not None:
            dy *= multiplier
            tl.store(dx + begin * COLUMNS + place, dy.to(dx.dtype.element_ty), mask=inside)
        if x_bias is not None:
            dx_sums += tl.sum(dy, 0)
    to = workspace + chunk * COLUMNS + column
    step = tl.num_programs(0).to(tl.int64) * COLUMNS
    tl.store(to, dweight, mask=column < COLUMNS)
    tl.store(to + step, dbias, mask=column < COLUMNS)
    if x_bias is not None:
        tl.store(to + 2 * step, dx_sums, mask=column < COLUMNS)


def residual_layer_norm_fwd(x, residual, weight, bias, x_bias, eps, dropout_p, seed, save):
    """(out, mean, rstd): LayerNorm(dropout(x + x_bias) + residual), and the statistics where they are to be saved."""
    x, residual, weight, bias, x_bias = registry.dense(x, residual, weight, bias, x_bias)
    out, mean, rstd = torch.empty_like(x), *statistics(x, x.shape[0], save)
    (rows, hidden), block = x.shape, tile(x.shape[1])
    _residual_layer_norm_fwd_kernel[(programs(x.device, block, rows),)](
        *(x, residual, weight, bias, x_bias, seed, out, mean, rstd, rows, eps, *dropout.settings(dropout_p, seed)),
        *(hidden, block.rows, block.columns),
        num_warps=block.warps,
    )
    return out, mean, rstd


def residual_layer_norm_bwd(dout, x, residual, weight, x_bias, mean, rstd, eps, dropout_p, seed):
    """The gradients (dx, dresidual, dweight, dbias, dx_bias); dx is empty without dropout, dx_bias without x_bias."""
    dout, x, residual, weight, x_bias = registry.dense(dout, x, residual, weight, x_bias)
    dresidual, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    dx = x.new_empty(0) if seed is None else torch.empty_like(x)
    dx_bias = x.new_empty(0) if x_bias is None else torch.empty_like(weight)
    (rows, hidden), block = x.shape, tile(x.shape[1])
    length = chunk_length(rows, block)
    sums = (dweight, dbias) if x_bias is None else (dweight, dbias, dx_bias)
    workspace = columns.workspace(x, length, len(sums))
    _residual_layer_norm_bwd_kernel[(workspace.shape[1],)](
        *(dout, x, residual, weight, x_bias, mean, rstd, seed, None if seed is None else dx, dresidual, workspace),
        *(rows, length, *dropout.settings(dropout_p, seed)),
        *(hidden, block.rows, block.columns),
        num_warps=block.warps,
    )
    columns.add_chunks(workspace, *sums)
    return dx, dresidual, dweight, dbias, dx_bias
