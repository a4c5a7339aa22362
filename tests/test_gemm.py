"""The CPU kernels' GEMMs on packed weights, in float32, bfloat16 and int8, against the reference in float64."""

import math
from itertools import product
from random import Random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from guarded import Guarded, guard
from torch import Tensor

from bertfast import native, reference

pytestmark = pytest.mark.skipif(native.cpu is None, reason=f"needs the CPU kernels: {native.cpu_reason}")

OPERANDS = ["float32", "bfloat16", "int8"]
DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = ["none", "gelu", "gelu_tanh"]
ISAS = native.cpu.available_isas() if native.cpu else []
# One, and around one and two of the tallest tiles, of 14 rows; eight of them are a task's.
ROWS = [1, 2, 13, 14, 15, 27, 28, 29, 113, 130]
COLUMNS = [1, 15, 16, 17, 31, 32, 33, 96]
# Around words of one, two and four elements; the last two go beyond the 1024 words of a piece, the last in int8 too.
DEPTHS = [1, 2, 3, 4, 5, 63, 64, 65, 769, 2100, 4100]
UNIT = 2.0**-24  # what rounding to float32 changes at most
INF, NAN = math.inf, math.nan


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test on each instruction set."""
    before = native.cpu.isa()
    native.cpu.set_isa(request.param)
    yield request.param
    native.cpu.set_isa(before)


@pytest.fixture(params=OPERANDS)
def operand(request):
    return request.param


class Rows(NamedTuple):
    """What operand_fwd makes of x: rows of whole words, and each row's scale and zero."""

    operand: str
    depth: int
    data: Guarded
    scale: Guarded
    zero: Guarded


class Weight(NamedTuple):
    """What pack_weights makes of a weight: panels of columns, and each column's scale and sum."""

    data: Guarded
    scale: Guarded
    sums: Guarded


def rounded(x: Tensor, operand: str) -> Tensor:
    """x in what the operand multiplies, but for int8's."""
    return x.bfloat16() if operand == "bfloat16" else x.float()


def rows_of(x: Tensor, operand: str) -> Rows:
    u, scale, zero = reference.quantise_rows(x)
    values = u if operand == "int8" else rounded(x, operand)
    data = guard(F.pad(values, (0, -x.shape[1] % (4 // values.itemsize))))
    return Rows(operand, x.shape[1], data, guard(scale), guard(zero))


def some(x: Rows, rows: slice) -> Rows:
    """These rows alone."""
    return Rows(
        x.operand, x.depth, *(guard(t) for t in (x.data.rows[rows], x.scale.rows[0, rows], x.zero.rows[0, rows]))
    )


def pack(weights: list[Tensor], operand: str, threads: int = 1) -> Weight:
    """The weights, (columns, depth) each, packed one below another."""
    columns, depth = sum(map(len, weights)), weights[0].shape[1]
    data = Guarded(1, native.cpu.packed_bytes(OPERANDS.index(operand), columns, depth), torch.uint8)
    data.rows.zero_()
    packed = Weight(data, Guarded(1, columns, torch.float32), Guarded(1, columns, torch.int32))
    first = 0
    for weight in weights:
        dense = guard(weight.flatten())
        native.cpu.pack_weights(
            DTYPES.index(weight.dtype),
            OPERANDS.index(operand),
            dense.address,
            first,
            *weight.shape,
            *(memory.address for memory in packed),
            threads,
        )
        first += len(weight)
    for memory in packed:
        memory.check()
    return packed


def gemm(
    x: Rows,
    weight: Weight,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    in_place: bool = False,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> Tensor:
    """gemm_fwd in guarded memory: (rows, columns). in_place: the residual lies where the output goes."""
    count, columns = x.data.rows.shape[0], weight.scale.rows.shape[1]
    out = Guarded(count, columns, dtype)
    added = None if residual is None else out if in_place else guard(residual)
    if added is out:
        out.rows.copy_(residual)
    vector = None if bias is None else guard(bias)
    native.cpu.gemm_fwd(
        DTYPES.index(dtype),
        OPERANDS.index(x.operand),
        x.data.address,
        x.data.stride * x.data.rows.itemsize,
        x.scale.address,
        x.zero.address,
        *(memory.address for memory in weight),
        vector.address if vector else 0,
        ACTIVATIONS.index(activation),
        added.address if added else 0,
        added.stride if added else 0,
        out.address,
        out.stride,
        count,
        columns,
        x.depth,
        threads,
    )
    out.check()
    return out.rows


def check(out, x, weight, operand, bias, activation, residual):
    """Assert that `out` is as near to activation(x W^T + bias) + residual of the rounded operands as float32 allows."""
    x, weight = (rounded(t, operand).double() for t in (x, weight))
    if operand == "int8":  # exact integers, rounded once, and the scales
        y = reference.quantised_linear(x, weight)
        limit = 4 * UNIT * y.abs()
    else:
        y = x @ weight.t()
        limit = 8 * UNIT * (x.abs() @ weight.abs().t())
    if bias is not None:
        y = y + bias
        limit += 2 * UNIT * (y.abs() + bias.abs())
    if activation != "none":
        y = reference.bias_gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
        limit = 1.13 * limit + 1e-6 * y.abs().clamp(min=1)
    if residual is not None:
        y = y + residual
        limit += UNIT * y.abs()
    error = (out.double() - y).abs()
    assert (error <= limit).all(), f"off by {error.max():.3g}"


def drawn_cases():
    """(rows, depth, columns, bias, activation, residual): every pair of the first two, with the others drawn."""
    random = Random(0)
    for rows, depth in product(ROWS, DEPTHS):
        yield rows, depth, *map(random.choice, (COLUMNS, [False, True], ACTIVATIONS, ["none", "apart", "in place"]))


def test_every_shape_and_epilogue(isa, operand):
    for case in drawn_cases():
        rows, depth, columns, has_bias, activation, residual = case
        x, weight = torch.randn(rows, depth), torch.randn(columns, depth) / depth**0.5
        bias = torch.randn(columns) if has_bias else None
        epilogue = {"bias": bias, "activation": activation}
        epilogue["residual"] = None if residual == "none" else 2 * torch.randn(rows, columns)
        left, right = rows_of(x, operand), pack([weight], operand)
        out = gemm(left, right, in_place=residual == "in place", **epilogue)
        try:
            check(out, x, weight, operand, **epilogue)
            half = gemm(left, right, dtype=torch.bfloat16, **epilogue)
            assert torch.equal(half, out.bfloat16()), "bfloat16 is not what float32 rounds to"
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_nothing_to_do(isa, operand):
    for rows, columns in ((0, 33), (5, 0), (0, 0)):
        out = gemm(rows_of(torch.randn(rows, 8), operand), pack([torch.randn(columns, 8)], operand))
        assert out.shape == (rows, columns)


def test_a_row_is_the_same_in_any_batch(isa, operand):
    depth = 4200  # pieces of every operand
    x, weight, bias = (
        rows_of(torch.randn(130, depth), operand),
        pack([torch.randn(33, depth)], operand),
        torch.randn(33),
    )
    whole = gemm(x, weight, bias=bias, activation="gelu")
    for count in (*range(1, 32), 112, 113):
        first, last = (
            gemm(some(x, s), weight, bias=bias, activation="gelu") for s in (slice(count), slice(-count, None))
        )
        assert torch.equal(first, whole[:count]) and torch.equal(last, whole[-count:]), count


@pytest.mark.parametrize("depth", [64, 4200])
def test_any_number_of_threads_and_again(isa, operand, depth):
    # Tasks of several tiles by several panels, on one thread; smaller ones on more.
    x, weight = rows_of(torch.randn(230, depth), operand), torch.randn(600 if depth == 64 else 170, depth)
    one = gemm(x, pack([weight], operand))
    for threads in (1, 2, 5):
        packed = pack([weight], operand, threads)
        assert torch.equal(gemm(x, packed, threads=threads), one)


@pytest.mark.skipif("avx512_vnni" not in ISAS, reason="needs a processor with several kinds of AVX-512")
@pytest.mark.parametrize("operand", ["float32", "int8"])
def test_every_avx512_gives_the_same_bits(operand):
    x, weight, bias = rows_of(torch.randn(29, 4200), operand), pack([torch.randn(33, 4200)], operand), torch.randn(33)
    before, found = native.cpu.isa(), []
    try:
        for isa in (isa for isa in ISAS if isa.startswith("avx512")):
            native.cpu.set_isa(isa)
            found.append(gemm(x, weight, bias=bias, activation="gelu"))
    finally:
        native.cpu.set_isa(before)
    assert len(found) > 1 and all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("operand", ["float32", "bfloat16"])
def test_what_is_not_finite_goes_where_it_belongs(isa, operand):
    x, weight = torch.randn(29, 65), torch.randn(33, 65)
    clean = gemm(rows_of(x, operand), pack([weight], operand))
    x[3, 0], x[14, 64], x[28, 31], x[20, 5] = NAN, INF, -INF, -INF
    weight[2, 64], weight[16, 0], weight[32, 33] = NAN, INF, -INF
    out = gemm(rows_of(x, operand), pack([weight], operand))
    exact = x.double() @ weight.double().t()
    rows, columns = x.isfinite().all(1), weight.isfinite().all(1)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out[out.isinf()].double(), exact[exact.isinf()])
    assert torch.equal(out[rows][:, columns], clean[rows][:, columns])


def test_what_is_not_finite_makes_whole_rows_and_columns_nan_in_int8(isa):
    x, weight, bias = torch.randn(29, 65), torch.randn(33, 65), torch.randn(33)
    clean = gemm(rows_of(x, "int8"), pack([weight], "int8"), bias=bias)
    x[3, 0], x[14, 64], x[28, 31] = NAN, INF, -INF
    weight[2, 64], weight[16, 0], weight[32, 33] = NAN, INF, -INF
    out = gemm(rows_of(x, "int8"), pack([weight], "int8"), bias=bias)
    rows, columns = x.isfinite().all(1), weight.isfinite().all(1)
    assert torch.equal(out.isnan(), ~(rows[:, None] & columns))
    assert torch.equal(out[rows][:, columns], clean[rows][:, columns])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite_through_the_activation(isa, activation):
    x = torch.tensor([[NAN], [INF], [3e38], [-3e38], [0.0], [-0.0]])
    out = gemm(rows_of(x, "float32"), pack([torch.ones(17, 1)], "float32"), activation=activation)
    expected = x if activation == "none" else torch.where(x < 0, 0, x)
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7).expand(-1, 17))


def test_the_largest_bytes_do_not_saturate(isa):
    depth = 8192
    x = rows_of(torch.ones(15, depth), "int8")
    assert (x.data.rows == 255).all()
    weight = torch.ones(33, depth)
    weight[1::2] = -1
    weight[2, depth // 2 :] = -1
    integers = (
        torch.tensor([255 * 127 * depth, -255 * 127 * depth] * 17)[:33].index_fill(0, torch.tensor(2), 0).double()
    )
    packed = pack([weight], "int8")
    assert torch.equal(packed.sums.rows[0], (integers / 255).int())
    scale = packed.scale.rows.double() * x.scale.rows[0, 0].double()
    out = gemm(x, packed).double()
    assert ((out - integers * scale).abs() <= 3 * UNIT * (integers * scale).abs()).all()

    zeros = rows_of(-torch.ones(15, depth), "int8")
    assert not zeros.data.rows.any() and (zeros.zero.rows == 255).all()
    assert torch.equal(gemm(zeros, packed).double(), -out)


def test_rows_and_weights_of_zeros_and_next_to_nothing(isa, operand):
    x, weight, bias = torch.randn(15, 65), torch.randn(33, 65), torch.randn(33)
    x[0], x[1], weight[0], weight[1] = 0, 1e-40, 0, 1e-40
    out = gemm(rows_of(x, operand), pack([weight], operand), bias=bias)
    nothing = torch.zeros_like(out, dtype=torch.bool)
    nothing[:2], nothing[:, :2] = True, True
    assert torch.equal(out[nothing], bias.expand_as(out)[nothing])
    check(out, x, weight, operand, bias, "none", None)


def unpacked(weight: Weight, operand: str, depth: int) -> Tensor:
    """The elements of a packed weight, (columns with the filling, depth with the filling)."""
    panels = weight.data.rows.reshape(-1, -(-depth // 2 ** OPERANDS.index(operand)), 16, 4)
    values = panels.contiguous().view(
        {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[operand]
    )
    return values.transpose(1, 2).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 3, 64, 67])
def test_packed_weights(operand, depth, dtype, threads):
    weights = [torch.randn(rows, depth).to(dtype) for rows in (5, 16, 1, 30, 37)]
    whole = torch.cat(weights)
    packed = pack(weights, operand, threads)
    found = unpacked(packed, operand, depth)
    q, scale = reference.quantise_weight(whole)
    assert found.shape[0] == 96 and depth <= found.shape[1] < depth + 4
    assert torch.equal(found[:89, :depth], q if operand == "int8" else rounded(whole, operand))
    assert not found[89:].any() and not found[:, depth:].any()
    if operand == "int8":
        assert torch.equal(packed.scale.rows[0], scale)
        assert torch.equal(packed.sums.rows[0], q.sum(1, dtype=torch.int32))


def test_packed_weights_that_are_not_like_the_others():
    weight = torch.randn(9, 33)
    weight[0, 0], weight[1, 32], weight[2] = NAN, INF, NAN
    weight[3], weight[4], weight[5] = 0, 1e-40, weight[5] * 1e-38
    weight[6, 4], weight[7, 5] = 3e38, -3e38
    q, scale = reference.quantise_weight(weight)
    packed = pack([weight], "int8")
    assert torch.equal(unpacked(packed, "int8", 33)[:9, :33], q)
    assert torch.equal(packed.scale.rows[0].nan_to_num(-1), scale.nan_to_num(-1))
    assert torch.equal(packed.scale.rows[0].isnan(), torch.arange(9) < 3)
    for operand in ("float32", "bfloat16"):
        found = unpacked(pack([weight], operand), operand, 33)[:9, :33]
        assert torch.equal(found.nan_to_num(7), rounded(weight, operand).nan_to_num(7))
