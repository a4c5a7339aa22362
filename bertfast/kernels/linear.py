"""linear: out = activation(x W^T + b), a GEMM that applies its activation before it writes.

A program has one tile of the output at a time: the matrix units add up its product in float32 registers over steps
along the inner axis, and bias and GELU are applied there, so that the wide output of the feed-forward block is written
once and rounded once, where a GEMM and a kernel after it would write, read and write it. Programs that run at the same
time take tiles that lie in a block of `group` rows of tiles, whose operands they find in the L2 cache.

There are two ways to the operands. Where the GPU has a tensor memory accelerator (Hopper and later), whole tiles come
and go through tensor descriptors, and as many programs as there are multiprocessors go through all tiles: the loads of
a tile begin while the one before it is still being activated. Elsewhere, and where an address or a row is no multiple
of 16 bytes, each thread loads its own elements, and there is a program for each tile.

Every output is the sum of the same products in the same order whatever the tile, and tiles do not share work: a token's
result does not depend on the batch it is in, unless the number of tokens changes the configuration's steps.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bertfast.kernels import hardware
from bertfast.kernels.gelu import gelu
from bertfast.layout import adjacent

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None


class Tile(NamedTuple):
    """The tile of the output that a program has, its steps along the inner axis, and how it is compiled."""

    rows: int
    columns: int
    depth: int  # in elements of two bytes; half as many of four
    warps: int
    stages: int
    rate: float  # of a multiprocessor, as a share of what it does with the best of these tiles


# What fits into shared memory and registers without spills, by architecture: the largest tile has the fewest bytes to
# load for each product, the smaller ones fill the multiprocessors where there are few tokens. The rates are those that
# cuBLAS's tiles of this size were calibrated to on an A100 (TensorRT's published BERT latencies), not measurements.
_AMPERE = (Tile(128, 128, 32, 8, 4, 1.0), Tile(64, 128, 32, 4, 4, 0.8), Tile(64, 64, 64, 4, 3, 0.55))
_AMPERE_LARGE = (Tile(128, 256, 32, 8, 4, 1.1), Tile(128, 128, 64, 8, 3, 1.0), *_AMPERE[1:])
_HOPPER = (
    Tile(128, 256, 64, 8, 3, 1.0),
    Tile(128, 128, 64, 8, 4, 0.9),
    Tile(64, 128, 64, 4, 4, 0.72),
    Tile(64, 64, 64, 4, 5, 0.5),
)
TILES: dict[int, tuple[Tile, ...]] = {80: _AMPERE_LARGE, 86: _AMPERE, 89: _AMPERE, 90: _HOPPER, 100: _HOPPER}
# Elements that are loaded one by one, and float32 products that are rounded to nothing less, on the ordinary units.
SMALL = Tile(64, 64, 32, 4, 3, 1.0)
GROUP = 8


@triton.jit
def _finish(
    product,  # (BLOCK_ROWS, some columns) float32
    bias,
    out,
    row,
    column,
    rows,
    columns,
    out_stride,
    ACTIVATION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Writes activation(product + bias) at (row, column) of the output."""
    c = column + tl.arange(0, product.shape[1])
    if bias is not None:
        product += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    DTYPE: tl.constexpr = out.dtype if DESCRIPTORS else out.dtype.element_ty
    if ACTIVATION != "none":
        product = gelu(product, ACTIVATION == "gelu_tanh", tl.float32 == DTYPE)
    if DESCRIPTORS:
        out.store([row, column], product.to(DTYPE))
    else:
        r = row + tl.arange(0, product.shape[0])
        to = out + r.to(tl.int64)[:, None] * out_stride + c[None, :]
        tl.store(to, product.to(DTYPE), mask=(r < rows)[:, None] & (c < columns)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _linear_fwd_kernel(
    x,  # (rows, depth): a pointer, or a descriptor of tiles (BLOCK_ROWS, BLOCK_DEPTH)
    w,  # (columns, depth): a pointer, or a descriptor of tiles (BLOCK_COLUMNS, BLOCK_DEPTH)
    bias,  # (columns,) or None
    out,  # (rows, columns): a pointer, or a descriptor of tiles (BLOCK_ROWS, BLOCK_COLUMNS / PARTS)
    rows,
    columns,
    depth,
    x_stride,  # from row to row, in elements; descriptors have their own
    w_stride,
    out_stride,
    ACTIVATION: tl.constexpr,  # "none", "gelu" or "gelu_tanh"
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_DEPTH divides the depth
    PARTS: tl.constexpr,  # 1, or 2: the output's tile is converted and written in halves
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    tiles_down, tiles_across = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    # Flattened, the two loops are one to the pipeliner, which then loads across the border between two tiles.
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0), flatten=DESCRIPTORS):
        group = tile // (GROUP * tiles_across)
        height = tl.minimum(tiles_down - group * GROUP, GROUP)
        within = tile % (GROUP * tiles_across)
        row = (group * GROUP + within % height) * BLOCK_ROWS
        column = (within // height) * BLOCK_COLUMNS
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        if DESCRIPTORS:
            for k in range(0, depth, BLOCK_DEPTH):
                # What lies outside is 0.
                product = tl.dot(x.load([row, k]), w.load([column, k]).T, product, input_precision=PRECISION)
        else:
            # Rows outside repeat the last one: they spoil only outputs that are not written.
            r = tl.minimum(row + tl.arange(0, BLOCK_ROWS), rows - 1).to(tl.int64)
            c = tl.minimum(column + tl.arange(0, BLOCK_COLUMNS), columns - 1).to(tl.int64)
            d = tl.arange(0, BLOCK_DEPTH)
            from_x = x + r[:, None] * x_stride + d[None, :]
            from_w = w + c[None, :] * w_stride + d[:, None]
            for k in range(0, depth, BLOCK_DEPTH):
                if EVEN:
                    a, b = tl.load(from_x), tl.load(from_w)
                else:
                    inside = d < depth - k
                    a = tl.load(from_x, mask=inside[None, :], other=0.0)
                    b = tl.load(from_w, mask=inside[:, None], other=0.0)
                product = tl.dot(a, b, product, input_precision=PRECISION)
                from_x += BLOCK_DEPTH
                from_w += BLOCK_DEPTH
        if PARTS == 1:
            _finish(product, bias, out, row, column, rows, columns, out_stride, ACTIVATION, DESCRIPTORS)
        else:
            HALF: tl.constexpr = BLOCK_COLUMNS // 2
            left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK_ROWS, 2, HALF)), (0, 2, 1)))
            _finish(left, bias, out, row, column, rows, columns, out_stride, ACTIVATION, DESCRIPTORS)
            _finish(right, bias, out, row, column + HALF, rows, columns, out_stride, ACTIVATION, DESCRIPTORS)


def linear_fwd(x, weights, biases, activation, packed=None):
    """activation(x [W1; W2; ...]^T + [b1; b2; ...]), (tokens, sum of out_features), in x's dtype.

    packed is for the CPU alone. Weights that lie behind one another in memory are one GEMM, others one each.
    """
    out = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))
    weight, bias = adjacent(weights), adjacent(biases) if biases else None
    if weight is not None and (bias is not None or not biases):
        _gemm(x, weight, bias, out, activation)
        return out
    for i, columns in enumerate(out.split([w.shape[0] for w in weights], dim=1)):
        _gemm(x, weights[i], biases[i] if biases else None, columns, activation)
    return out


def _gemm(x, weight, bias, out, activation, tile=None):
    """Fills out, (rows, columns) with dense rows. tile: another than the one that is chosen, to compare them."""
    if out.numel() == 0:
        return
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    bias = None if bias is None else bias.contiguous()
    operands, (rows, depth), columns = (x, weight, out), x.shape, weight.shape[0]
    architecture, multiprocessors = hardware.architecture(x.device), hardware.multiprocessors(x.device)
    precision = "tf32" if x.dtype == torch.float32 and _tf32() else "ieee"
    aligned = (x.dtype != torch.float32 or precision == "tf32") and depth > 0 and all(map(_aligned, operands))
    descriptors = aligned and architecture >= 90 and TensorDescriptor is not None
    # Triton takes a size for a multiple of 16 bytes, and loads so much at once, where 16 divides it.
    wide = aligned and depth % 16 == columns % 16 == 0
    if tile is None:
        tile = choose(rows, columns, architecture, multiprocessors) if descriptors or wide else SMALL
    block_depth = tile.depth * 2 // x.element_size()
    parts = 2 if tile.columns == 256 else 1
    if descriptors:
        blocks = (tile.rows, block_depth), (tile.columns, block_depth), (tile.rows, tile.columns // parts)
        operands = [TensorDescriptor(t, t.shape, t.stride(), list(b)) for t, b in zip(operands, blocks, strict=True)]
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    _linear_fwd_kernel[(min(tiles, multiprocessors) if descriptors else tiles,)](
        *operands[:2],
        bias,
        operands[2],
        rows,
        columns,
        depth,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        ACTIVATION=activation,
        PRECISION=precision,
        DESCRIPTORS=descriptors,
        EVEN=depth % block_depth == 0,
        PARTS=parts,
        GROUP=GROUP,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_DEPTH=block_depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def choose(rows: int, columns: int, architecture: int, multiprocessors: int) -> Tile:
    """The tile with which all multiprocessors are done soonest: each does so many tiles one after another.

    Of two that are as fast, the larger.
    """
    known = max((a for a in TILES if a <= architecture), default=80)

    def time(tile: Tile) -> float:
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        return triton.cdiv(tiles, multiprocessors) * tile.rows * tile.columns / tile.rate

    return min(TILES[known], key=time)


def _aligned(t: torch.Tensor) -> bool:
    """Whether 16 bytes divide the matrix's address and its rows."""
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0


def _tf32() -> bool:
    """Whether PyTorch may round float32 factors to TF32, by either of its settings, the newer one first."""
    settings = torch.backends.cuda.matmul
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
