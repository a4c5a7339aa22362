"""bias_gelu against the reference in float64."""

import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bertfast import backend, reference
from bertfast.ops import bias_gelu

SHAPES = [(0, 8), (1, 1), (1, 3072), (3, 17), (65, 1248), (130, 96), (257, 5)]
DTYPES = [torch.float32, torch.bfloat16]
APPROXIMATIONS = ["none", "tanh"]


def make_inputs(rows, columns, dtype):
    return [2 * torch.randn(rows, columns, dtype=dtype), torch.randn(columns, dtype=dtype)]


def check_parity(shape, approximate, dtype, device="cpu"):
    parity.check_gradients(
        lambda x, bias: bias_gelu(x, bias, approximate=approximate),
        lambda x, bias: reference.bias_gelu(x, bias, approximate),
        lambda x, bias: F.gelu(x + bias, approximate=approximate),
        [t.to(device) for t in make_inputs(*shape, dtype)],
        ("x", "bias"),
        rows=shape[0],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_in_both_directions(implementation, shape, approximate, dtype):
    check_parity(shape, approximate, dtype)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (9000, 24)])  # more rows than the shortest chunks have room for
def test_parity_of_float16_on_cuda(cuda_device, shape, approximate):
    check_parity(shape, approximate, torch.float16, cuda_device)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (130, 96)])
def test_parity_of_float16_in_triton(triton_device, shape, approximate):
    check_parity(shape, approximate, torch.float16, triton_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (9000, 768)])
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_parity_on_the_gpu(kernels, shape, approximate, dtype):
    with backend.use(kernels):
        check_parity(shape, approximate, dtype, "cuda")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_addresses_that_are_not_aligned_on_cuda(cuda_device, dtype):
    inputs = [t.to(cuda_device) for t in make_inputs(33, 256, dtype)]
    dout = torch.randn_like(inputs[0])

    def run(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = bias_gelu(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    shifted = run(*map(parity.misaligned, inputs))
    assert all(torch.equal(a, b) for a, b in zip(shifted, run(*inputs), strict=True))


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_extremes_on_cuda(cuda_device, approximate):
    x = torch.tensor([[float("nan"), float("inf"), 1e30, -1e30, 0.0]], device=cuda_device, requires_grad=True)
    out = bias_gelu(x, approximate=approximate)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert out[0, 0].isnan() and out[0, 1:].tolist() == [float("inf"), x[0, 2].item(), 0, 0]
    assert dx[0, 0].isnan() and dx[0, 1:].tolist() == pytest.approx([1, 1, 0, 0.5])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_addresses_that_are_not_aligned_in_triton(triton_device, dtype):
    test_addresses_that_are_not_aligned_on_cuda(triton_device, dtype)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_extremes_in_triton(triton_device, approximate):
    test_extremes_on_cuda(triton_device, approximate)


def test_same_bits_in_any_schedule(cuda_on_the_host):
    inputs = [t.requires_grad_() for t in make_inputs(70, 200, torch.float32)]

    def run():
        out = bias_gelu(*inputs)
        return [out, *torch.autograd.grad(out.sum(), inputs)]

    parity.check_schedules(run)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_every_size_of_argument(native_implementation, approximate):
    x = torch.cat((torch.linspace(-12, 12, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e30, -1e30])))
    x = x[None].requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, gold = bias_gelu(x, approximate=approximate), reference.bias_gelu(wide, approximate=approximate)
    assert ((out.double() - gold).abs() / gold.abs().clamp(min=1)).max() < 1e-6
    (dx,), (dgold,) = (
        torch.autograd.grad(out.sum(), x),
        torch.autograd.grad(F.gelu(wide, approximate=approximate).sum(), wide),
    )
    assert (dx.double() - dgold).abs().max() < 2e-6


def test_nan_and_infinity(native_implementation):
    out = bias_gelu(torch.tensor([[float("nan"), float("inf"), 1.0]]))
    assert out[0, 0].isnan() and out[0, 1] == float("inf") and out[0, 2].isfinite()


def test_non_contiguous_and_no_bias(implementation):
    x, _ = make_inputs(20, 64, torch.float32)
    assert torch.equal(bias_gelu(x.t().contiguous().t()), bias_gelu(x))


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_opcheck(implementation, approximate):
    x, bias = (t.requires_grad_() for t in make_inputs(5, 33, torch.float32))
    opcheck(torch.ops.bertfast.bias_gelu, (x, bias, approximate))
    opcheck(torch.ops.bertfast.bias_gelu, (x, None, approximate))
    opcheck(torch.ops.bertfast.bias_gelu_backward, (torch.randn(5, 33), x.detach(), bias.detach(), approximate))


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gradients_of_the_reference(approximate):
    inputs = [t.requires_grad_() for t in make_inputs(4, 7, torch.float64)]
    assert torch.autograd.gradcheck(lambda x, b: reference.bias_gelu(x, b, approximate), inputs)
    out = reference.bias_gelu(*inputs, approximate)
    dout = torch.randn_like(out)
    spelled_out = reference.bias_gelu_backward(dout, *(t.detach() for t in inputs), approximate)
    torch.testing.assert_close(spelled_out, torch.autograd.grad(out, inputs, dout))


def test_compiles_whole_and_once_for_all_lengths(compiles_once):
    compiles_once(lambda rows: make_inputs(rows, 48, torch.float32), bias_gelu)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": torch.zeros(4)}, ValueError, "tokens, features"),
        ({"x": torch.zeros(2, 4), "bias": torch.zeros(3)}, ValueError, "bias has shape"),
        ({"x": torch.zeros(2, 4), "bias": torch.zeros(4).double()}, TypeError, "bias is torch.float64"),
        ({"x": torch.zeros(2, 4), "approximate": "sigmoid"}, ValueError, "sigmoid"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        bias_gelu(**arguments)
