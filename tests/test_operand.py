"""The rows that the CPU kernels' GEMMs multiply, against the reference."""

import math
from typing import NamedTuple

import pytest
import torch
from guarded import Guarded, guard
from torch import Tensor

from bertfast import native, reference

pytestmark = pytest.mark.skipif(native.cpu is None, reason=f"needs the CPU kernels: {native.cpu_reason}")

EPS = 1e-12
ROWS = [1, 7, 64]
# One, around a vector of 16 and four of them, whole words, MiniLM, BERT-base, and an odd tail.
COLUMNS = [1, 2, 3, 15, 16, 17, 20, 63, 64, 65, 384, 768, 1023]
DTYPES = [torch.float32, torch.bfloat16]
OPERANDS = [torch.float32, torch.bfloat16, torch.uint8]
INF, NAN = math.inf, math.nan


@pytest.fixture(params=native.cpu.available_isas() if native.cpu else [])
def isa(request):
    """Runs the test on each instruction set."""
    before = native.cpu.isa()
    native.cpu.set_isa(request.param)
    yield request.param
    native.cpu.set_isa(before)


class Made(NamedTuple):
    """What a call writes: LayerNorm's output, or whatever goes in; and the operand's rows, scales and zeros."""

    out: Tensor | None
    rows: Tensor | None
    scale: Tensor
    zero: Tensor


def make(x, norm=(), *, out=None, operand=None, in_place=False, threads=1):
    """operand_fwd in guarded memory. norm: LayerNorm's weight and bias; out: its output's dtype; operand: the rows'."""
    (count, columns), source = x.shape, guard(x)
    target = source if in_place else Guarded(count, columns, out or torch.float32)
    itemsize = (operand or torch.float32).itemsize
    rows = Guarded(count, -(-columns * itemsize // 4) * 4 // itemsize, operand or torch.float32)
    vectors = [guard(v) for v in norm]
    scale, zero = Guarded(1, count, torch.float32), Guarded(1, count, torch.int32)
    native.cpu.operand_fwd(
        DTYPES.index(x.dtype),
        source.address,
        source.stride,
        *([v.address for v in vectors] or [0, 0]),
        EPS,
        DTYPES.index(target.rows.dtype),
        target.address if out or in_place else 0,
        target.stride,
        OPERANDS.index(rows.rows.dtype),
        rows.address if operand else 0,
        rows.stride * itemsize,
        scale.address,
        zero.address,
        count,
        columns,
        threads,
    )
    for memory in (source, target, rows, scale, zero, *vectors):
        memory.check()
    assert in_place or same(source.rows, x)
    return Made(target.rows if out or in_place else None, rows.rows if operand else None, scale.rows[0], zero.rows[0])


def same(a, b):
    """Equal bit for bit, but for which NaN and which zero."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def check_rows(made, x):
    """The operand's rows are those of the float32 rows x, filled up with zeros."""
    columns = x.shape[1]
    rows, rest = made.rows[:, :columns], made.rows[:, columns:]
    assert rest.shape[1] < 4 and not rest.any()
    if rows.dtype != torch.uint8:
        assert same(rows, x.to(rows.dtype))
        return
    u, scale, zero = reference.quantise_rows(x)
    assert same(made.scale, scale) and torch.equal(made.zero, zero)
    # One step beside it where the quotient is halfway between two, as far as float32 can tell.
    off = rows != u
    quotient = (x.double() / scale.double()[:, None])[off]
    assert not off.any() or (rows.int() - u.int()).abs().max() == 1
    assert ((quotient - quotient.floor() - 0.5).abs() < 1e-4).all()


@pytest.mark.parametrize("norm", [False, True], ids=["as is", "norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form(isa, dtype, norm):
    for columns in COLUMNS:
        for count in ROWS:
            x = (3 * torch.randn(count, columns) + 1).to(dtype)
            vectors = (1 + torch.randn(columns) / 2, torch.randn(columns)) if norm else ()
            whole = make(x, vectors, out=torch.float32).out
            if norm:
                check_norm(whole, x.double(), *(v.double() for v in vectors))
            else:
                assert torch.equal(whole, x.float())
            assert torch.equal(make(x, vectors, out=torch.bfloat16).out, whole.bfloat16())
            for operand in OPERANDS:
                check_rows(make(x, vectors, operand=operand), whole)
                made = make(x, vectors, out=torch.bfloat16, operand=operand)
                assert torch.equal(made.out, whole.bfloat16())
                check_rows(made, whole)


def check_norm(out, x, weight, bias):
    gold = reference.layer_norm(x, weight, bias, EPS)
    _, rstd = reference.row_statistics(x, EPS)
    # The mean is rounded, which is as much as the values are large beside their deviations.
    limit = 1e-6 * weight.abs() * (1 + x.abs().amax(1) * rstd)[:, None] + 2e-7 * (gold.abs() + bias.abs())
    assert ((out - gold).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(isa, dtype):
    x, norm = torch.randn(7, 65).to(dtype), (torch.randn(65), torch.randn(65))
    for operand in OPERANDS:
        there, here = (make(x, norm, out=dtype, operand=operand, in_place=way) for way in (False, True))
        assert all(same(a, b) for a, b in zip(there, here, strict=True))


def test_any_number_of_threads(isa):
    x, norm = torch.randn(64, 1023), (torch.randn(1023), torch.randn(1023))
    one, *others = (make(x, norm, out=torch.float32, operand=torch.uint8, threads=n) for n in (1, 2, 5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


def test_no_rows(isa):
    for operand in OPERANDS:
        assert make(torch.randn(0, 5), out=torch.float32, operand=operand).rows.shape[0] == 0


def extremes(columns):
    """Rows of every kind that is not like the others, in the order of the names."""
    x = torch.randn(17, columns)
    last = columns - 1
    x[0, 0], x[1, last], x[2, last // 2], x[3, 0], x[3, last] = NAN, INF, -INF, INF, -INF
    x[4, 0], x[5, last], x[6, 0], x[6, last] = 3e38, -3e38, 3e38, -3e38
    x[7:10] *= torch.tensor([1e-40, 1e-38, 1e-36])[:, None]
    x[10], x[11], x[12], x[13] = 0, -0.0, 3, -3
    x[14], x[15] = x[14].abs(), -x[15].abs()
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 17, 64, 77])
def test_extremes(isa, columns, dtype):
    x = extremes(columns).to(dtype)
    for operand in OPERANDS:
        made = make(x, out=torch.float32, operand=operand)
        assert same(made.out, x.float())
        check_rows(made, x.float())
    assert torch.equal(made.scale.isnan(), ~x.isfinite().all(1))
    assert torch.equal(made.scale[10:12], torch.zeros(2)) and made.scale[12:].all()


@pytest.mark.parametrize("columns", [17, 64, 77])
def test_extremes_through_the_norm(isa, columns):
    x = extremes(columns)
    weight, bias = 1 + torch.rand(columns), torch.randn(columns)
    made = make(x, (weight, bias), out=torch.float32, operand=torch.uint8)
    finite = x.isfinite().all(1)
    assert made.out[~finite].isnan().all() and made.scale[~finite].isnan().all()
    assert torch.equal(made.out[10:14], bias.expand(4, -1))  # constant rows
    check_norm(made.out[14:], *(t.double() for t in (x[14:], weight, bias)))
    check_rows(made, made.out)


def test_the_reference_is_as_near_as_eight_bits_are():
    x = torch.cat((extremes(77)[4:], 3 * torch.randn(50, 77) + torch.linspace(-9, 9, 50)[:, None]))
    u, scale, zero = reference.quantise_rows(x)
    assert ((zero >= 0) & (zero <= 255)).all()  # so that 0 is one of the values
    near = scale[:, None].double() * (u.double() - zero[:, None])
    assert ((near - x).abs() <= 0.5001 * scale[:, None] + 1e-36).all()
    reach = (x.amax(1).clamp(min=0).double() - x.amin(1).clamp(max=0)) / 255
    assert ((reach - scale).abs() <= 1e-6 * reach + 3e-39).all()

    q, weight_scale = reference.quantise_weight(x)
    near = weight_scale[:, None].double() * q.double()
    assert ((near - x).abs() <= 0.5001 * weight_scale[:, None] + 1e-36).all()
    assert torch.equal(q.abs().amax(1) == 127, weight_scale > 0)

    x, weight, bias = torch.randn(20, 768), torch.randn(30, 768), torch.randn(30)
    exact = x.double() @ weight.double().t() + bias
    error = reference.quantised_linear(x, weight, bias) - exact
    assert error.norm() < 0.02 * exact.norm()
    assert torch.equal(reference.quantised_linear(x, weight), reference.quantised_linear(x, weight, 0 * bias))


def test_the_reference_of_what_is_not_finite():
    x = extremes(9)
    for scale in (reference.quantise_rows(x)[1], reference.quantise_weight(x)[1]):
        assert torch.equal(scale.isnan(), ~x.isfinite().all(1))
    weight = torch.randn(3, 9).index_put_((torch.tensor(1), torch.tensor(4)), torch.tensor(INF))
    y = reference.quantised_linear(x, weight)
    assert torch.equal(y.isnan(), ~x.isfinite().all(1)[:, None] | ~weight.isfinite().all(1))
