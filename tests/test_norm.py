"""residual_layer_norm against the reference in float64."""

import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bertfast import backend, reference
from bertfast.errors import BackendError
from bertfast.ops import residual_layer_norm
from bertfast.ops.norm import WIDEST_IN_TRITON

EPS = 1e-12
# Rows: none, one, a few, more than a block of rows of any kernel. Columns: one, less than a vector, odd tails,
# MiniLM, BERT-base, BERT-large.
SHAPES = [(0, 64), (1, 1), (1, 768), (3, 17), (5, 312), (65, 384), (130, 768), (33, 1024), (257, 9)]
# What else GPUs have to be right for: rows of several warps, the widest of one piece, and those of two and three.
WIDE_SHAPES = [(5, 2056), (2, 4096), (3, 4100), (2, 8200)]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("x", "residual", "weight", "bias", "x_bias")


def make_inputs(rows, columns, dtype):
    x, residual = torch.randn(2, rows, columns, dtype=dtype)
    weight, bias, x_bias = 1 + torch.randn(columns, dtype=dtype) / 2, *torch.randn(2, columns, dtype=dtype)
    return [x, residual * 3 + 1, weight, bias, x_bias]


def op(x, residual, weight, bias, x_bias, p=0.0, seed=None):
    return residual_layer_norm(x, residual, weight, bias, EPS, x_bias=x_bias, dropout_p=p, seed=seed)


def gold(x, residual, weight, bias, x_bias, p=0.0, seed=None):
    return reference.residual_layer_norm(x, residual, weight, bias, EPS, x_bias, p, seed)


def plain(x, residual, weight, bias, x_bias, p=0.0, seed=None):
    y = reference.dropout(x + x_bias, p, seed)
    return F.layer_norm(y + residual, weight.shape, weight, bias, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_in_both_directions(implementation, shape, dtype):
    if implementation == "triton":
        shape = min(shape[0], 37), shape[1]  # an interpreter goes through every row
    inputs = make_inputs(*shape, dtype)
    if shape[1] == 1:  # the norm of one value is its bias, and its gradient is rounding noise over sqrt(eps)
        parity.check(op(*inputs), gold(*(t.double() for t in inputs)), plain(*inputs))
        return
    parity.check_gradients(op, gold, plain, inputs, NAMES, rows=shape[0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", WIDE_SHAPES)
def test_parity_of_wide_rows_on_cuda(cuda_device, shape, dtype):
    inputs = [t.to(cuda_device) for t in make_inputs(*shape, dtype)]
    parity.check_gradients(op, gold, plain, inputs, NAMES, rows=shape[0])


@pytest.mark.parametrize("shape", [(4200, 24), (8300, 3)])  # several rows to a team, and more than the shortest chunks
def test_parity_of_many_rows_on_cuda(cuda_device, shape):
    inputs = [t.to(cuda_device) for t in make_inputs(*shape, torch.bfloat16)]
    parity.check_gradients(op, gold, plain, inputs, NAMES, rows=shape[0])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1])
def test_parity_of_float16_on_cuda(cuda_device, shape):
    inputs = [t.to(cuda_device) for t in make_inputs(*shape, torch.float16)]
    parity.check_gradients(op, gold, plain, inputs, NAMES, rows=shape[0])


@pytest.mark.parametrize("shape", [(3, 17), (5, 312), (21, 100)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_parity_of_float16_in_triton(triton_device, p, shape):
    seed = torch.tensor([-0x123456789ABCDEF], device=triton_device)
    inputs = [t.to(triton_device) for t in make_inputs(*shape, torch.float16)]
    functions = [lambda *t, f=f: f(*t, p, seed if p else None) for f in (op, gold, plain)]
    parity.check_gradients(*functions, inputs, NAMES, rows=shape[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*(shape for shape in SHAPES if shape[1] > 1), (20000, 768)])
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_parity_on_the_gpu(kernels, shape, dtype):
    inputs = [t.cuda() for t in make_inputs(*shape, dtype)]
    with backend.use(kernels):
        parity.check_gradients(op, gold, plain, inputs, NAMES, rows=shape[0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(7, 96), (3, 800)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_addresses_that_are_not_aligned_on_cuda(cuda_device, p, shape, dtype):
    seed = torch.tensor([3], device=cuda_device)
    inputs = [t.to(cuda_device) for t in make_inputs(*shape, dtype)]
    functions = [lambda *t, f=f: f(*map(parity.misaligned, t), p, seed if p else None) for f in (op, gold, plain)]
    parity.check_gradients(*functions, inputs, NAMES, rows=shape[0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("columns", [24, 100, 33, 4104])
def test_masks_on_cuda_are_those_of_the_reference(cuda_device, columns, dtype):
    seed, p = torch.tensor([-0x123456789ABCDEF], device=cuda_device), 0.3
    x, residual, *vectors = (t.to(cuda_device) for t in make_inputs(13, columns, dtype))
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    out = op(*leaves, *vectors, p, seed)
    dx, dresidual = torch.autograd.grad(out, leaves, torch.randn_like(out))
    if dtype == torch.float32:
        assert torch.equal(dx, reference.dropout(dresidual, p, seed))
    else:  # the gradients are rounded after the dropout
        ones = reference.dropout(torch.ones_like(dx), p, seed)
        assert torch.equal((dx == 0) & (dresidual != 0), (ones == 0) & (dresidual != 0))
    assert 0.2 < (dx == 0).float().mean() < 0.4


# Every width of a tile, and float32's four and the others' eight columns to a thread.
@pytest.mark.parametrize(("columns", "rows"), [(33, 70), (200, 9), (312, 7), (1000, 5), (2040, 3), (4096, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width_in_triton(triton_device, dtype, rows, columns):
    seed = torch.tensor([1 << 40], device=triton_device)
    inputs = [t.to(triton_device) for t in make_inputs(rows, columns, dtype)]
    functions = [lambda *t, f=f: f(*t, 0.2, seed) for f in (op, gold, plain)]
    parity.check_gradients(*functions, inputs, NAMES, rows=rows)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("columns", [24, 100, 33, 1000])
def test_masks_in_triton_are_those_of_the_reference(triton_device, columns, dtype):
    test_masks_on_cuda_are_those_of_the_reference(triton_device, columns, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_addresses_that_are_not_aligned_in_triton(triton_device, p, dtype):
    test_addresses_that_are_not_aligned_on_cuda(triton_device, p, (7, 96), dtype)


@pytest.mark.parametrize("columns", [41, 49, 55, 98, 107, 312])  # some of which times their reciprocal are not 1
def test_constant_rows_become_their_bias_in_triton(triton_device, columns):
    x, bias = torch.full((2, columns), 7.0, device=triton_device), torch.randn(columns, device=triton_device)
    out = residual_layer_norm(x, x, torch.ones_like(bias), bias, EPS)
    assert torch.equal(out, bias.expand_as(out))


def test_triton_refuses_rows_that_are_too_wide(triton_interpreted):
    inputs = make_inputs(1, WIDEST_IN_TRITON + 1, torch.float32)
    with pytest.raises(BackendError, match="rows of up to 4096 columns, not 4097"):
        op(*inputs)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("columns", [40, 600])
def test_same_bits_in_any_schedule(cuda_on_the_host, columns, p):
    inputs = [t.requires_grad_() for t in make_inputs(70, columns, torch.float32)]

    def run():
        out = op(*inputs, p=p, seed=torch.tensor([3]) if p else None)
        return [out, *torch.autograd.grad(out.sum(), inputs)]

    parity.check_schedules(run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_parity_in_both_directions(implementation, p, dtype):
    seed = torch.tensor([-0x123456789ABCDEF])
    inputs = make_inputs(37, 100, dtype)
    functions = [lambda *t, f=f: f(*t, p, seed) for f in (op, gold, plain)]
    parity.check_gradients(*functions, inputs, NAMES, rows=37)


def test_dropout_is_seeded_by_torch():
    inputs = make_inputs(64, 64, torch.float32)
    torch.manual_seed(1)
    first, second = op(*inputs, p=0.3), op(*inputs, p=0.3)
    torch.manual_seed(1)
    assert torch.equal(first, op(*inputs, p=0.3)) and not torch.equal(first, second)


def test_leaves_what_was_given_and_no_x_bias(implementation):
    inputs = make_inputs(9, 48, torch.float32)
    copies = [t.clone() for t in inputs]
    out = residual_layer_norm(*inputs[:4], EPS)
    parity.check(out, gold(*(t.double() for t in inputs[:4]), None))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_non_contiguous(implementation):
    x, residual, *vectors = make_inputs(20, 64, torch.float32)
    wide = torch.randn(20, 128)
    wide[:, ::2] = x
    assert torch.equal(op(wide[:, ::2], residual.t().contiguous().t(), *vectors), op(x, residual, *vectors))


def test_extreme_rows(native_implementation):
    weight, bias = torch.ones(40), torch.zeros(40)
    constant = torch.full((2, 40), 7.0)
    assert torch.equal(residual_layer_norm(constant, constant, weight, bias), torch.zeros(2, 40))
    offset, zero = torch.randn(3, 40) + 1e4, torch.zeros(3, 40)
    wide = [t.double() for t in (offset, zero, weight, bias)]
    error = residual_layer_norm(offset, zero, weight, bias, EPS) - reference.residual_layer_norm(*wide, EPS)
    assert error.abs().max() < 2e-3  # two roundings of the mean; E[x^2] - E[x]^2 would be off by more than 1
    x = torch.randn(3, 40)
    x[1, 5] = float("nan")
    out = residual_layer_norm(x, torch.zeros(3, 40), weight, bias)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_same_bits_whatever_the_threads(native_implementation):
    if native_implementation == "triton":
        pytest.skip("has no threads: test_kernels.py")
    inputs = [t.requires_grad_() for t in make_inputs(300, 96, torch.float32)]

    def run():
        out = op(*inputs, p=0.1, seed=torch.tensor([3]))
        return [out, *torch.autograd.grad(out.sum(), inputs)]

    parity.check_threads(run)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck(implementation, p):
    x, residual, weight, bias, x_bias = (t.requires_grad_() for t in make_inputs(6, 24, torch.float32))
    seed = torch.tensor([5]) if p else None
    opcheck(torch.ops.bertfast.residual_layer_norm, (x, residual, weight, bias, x_bias, EPS, p, seed))
    mean = torch.zeros(6)
    arguments = (torch.randn(6, 24), x.detach(), residual.detach(), weight.detach(), None, mean, mean + 1, EPS, p, seed)
    opcheck(torch.ops.bertfast.residual_layer_norm_backward, arguments)


def test_gradients_of_the_reference():
    inputs = [t.requires_grad_() for t in make_inputs(4, 7, torch.float64)]
    arguments = 0.3, torch.tensor([9])
    assert torch.autograd.gradcheck(lambda *t: gold(*t, *arguments), inputs)
    out = gold(*inputs, *arguments)
    dout, (x, residual, weight, _, x_bias) = torch.randn_like(out), (t.detach() for t in inputs)
    spelled_out = reference.residual_layer_norm_backward(dout, x, residual, weight, EPS, x_bias, *arguments)
    torch.testing.assert_close(spelled_out, list(torch.autograd.grad(out, inputs, dout)))


def test_compiles_whole_and_once_for_all_lengths(compiles_once):
    compiles_once(lambda rows: make_inputs(rows, 48, torch.float32), op)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "tokens, hidden"),
        ({"residual": torch.zeros(3, 4)}, ValueError, "residual has shape"),
        ({"weight": torch.zeros(5)}, ValueError, "weight has shape"),
        ({"bias": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, "bias is torch.bfloat16"),
        ({"x_bias": torch.zeros(4, device="meta")}, ValueError, "x_bias is on meta"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"dropout_p": 0.5, "seed": torch.zeros(1)}, TypeError, "seed"),
    ],
)
def test_bad_input(change, error, words):
    good = {"x": torch.zeros(2, 4), "residual": torch.zeros(2, 4), "weight": torch.ones(4), "bias": torch.zeros(4)}
    with pytest.raises(error, match=words):
        residual_layer_norm(**{**good, **change})
