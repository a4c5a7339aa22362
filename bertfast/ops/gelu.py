"""bias_gelu: GELU(x + bias), the activation of the feed-forward block."""

import torch
from torch import Tensor

from bertfast import backend, reference
from bertfast.ops import cpu, cuda, registry

APPROXIMATIONS = ("none", "tanh")


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """GELU(x + bias) = u (1 + erf(u / sqrt 2)) / 2 with u = x + bias.

    Args:
        x: (tokens, features).
        bias: (features,) of x's dtype, or None.
        approximate: "none" for the erf form, which is BERT's, or "tanh" for
            u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2.

    Returns (tokens, features) in x's dtype, computed in float32 and rounded once. The backward recomputes from x;
    nothing else is kept. Raises ValueError / TypeError where shapes, dtypes or devices do not fit. Source: Hendrycks &
    Gimpel 2016.
    """
    registry.check_axes("x", x, "tokens", "features")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate must be one of {APPROXIMATIONS}, not {approximate!r}")
    if bias is not None:
        registry.check_like(x, bias=(bias, x.shape[1:]))
    if registry.seen(x, bias):
        return _op(x, bias, approximate)
    forward, _ = backend.implementation("bias_gelu", x)
    return forward(x, bias, approximate)


def cpu_gelu_(x: Tensor, approximate: str) -> Tensor:
    """GELU of x in its own memory on the CPU kernels, for a caller that holds the only use of x. x: dense, 2-D."""
    cpu.launch("bias_gelu_fwd", x.dtype, x, None, x, *x.shape, approximate == "tanh")
    return x


def gelu_again(dout: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    """(GELU(x + bias), dx, dbias) for a backward whose forward kept x alone. dout is the caller's to lose.

    On the CPU in one pass, with dx in dout's memory.
    """
    forward, backward = backend.implementation("bias_gelu", x)
    if backward is not _cpu_backward:
        return forward(x, bias, approximate), *backward(dout, x, bias, approximate)
    dout, x, bias = registry.dense(dout, x, bias)
    out, dbias = torch.empty_like(x), torch.empty_like(bias)
    cpu.launch("bias_gelu_bwd", x.dtype, dout, x, bias, out, dout, dbias, *x.shape, approximate == "tanh")
    return out, dout, dbias


def _cpu_forward(x, bias, approximate):
    x, bias = registry.dense(x, bias)
    out = torch.empty_like(x)
    cpu.launch("bias_gelu_fwd", x.dtype, x, bias, out, *x.shape, approximate == "tanh")
    return out


def _cpu_backward(dout, x, bias, approximate):
    dout, x, bias = registry.dense(dout, x, bias)
    dx, dbias = torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)
    tensors = (dout, x, bias, None, dx, None if bias is None else dbias)
    cpu.launch("bias_gelu_bwd", x.dtype, *tensors, *x.shape, approximate == "tanh")
    return dx, dbias


def _cuda_forward(x, bias, approximate):
    x, bias = registry.dense(x, bias)
    out = torch.empty_like(x)
    cuda.launch("bias_gelu_fwd", x, x, bias, out, *x.shape, approximate == "tanh")
    return out


def _cuda_backward(dout, x, bias, approximate):
    dout, x, bias = registry.dense(dout, x, bias)
    dx, dbias = torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)
    sums = (None, None) if bias is None else (dbias, cuda.column_sums(x))
    cuda.launch("bias_gelu_bwd", x, dout, x, bias, dx, *sums, *x.shape, approximate == "tanh")
    return dx, dbias


def _reference_backward(dout, x, bias, approximate):
    dx, dbias = reference.bias_gelu_backward(dout, x, bias, approximate)
    return dx, x.new_empty(0) if bias is None else dbias


backend.register("bias_gelu", "cuda", (_cuda_forward, _cuda_backward))
backend.register("bias_gelu", "triton", backend.Later("bertfast.kernels.gelu", "bias_gelu_fwd", "bias_gelu_bwd"))
backend.register("bias_gelu", "cpu", (_cpu_forward, _cpu_backward))
backend.register("bias_gelu", "reference", (reference.bias_gelu, _reference_backward))


def _run(x, bias, approximate):
    forward, _ = backend.implementation("bias_gelu", x)
    return forward(x, bias, approximate)


def _fake(x, bias, approximate):
    return x.new_empty(x.shape)


def _run_backward(dout, x, bias, approximate):
    _, backward = backend.implementation("bias_gelu", x)
    return backward(dout, x, bias, approximate)


def _fake_backward(dout, x, bias, approximate):
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else bias.shape)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _autograd(ctx, dout):
    x, bias = ctx.saved_tensors
    dx, dbias = _op_backward(dout, x, bias, ctx.approximate)
    return dx, None if bias is None else dbias, None


_op_backward = registry.define(
    "bias_gelu_backward(Tensor dout, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_op = registry.define(
    "bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor", _run, _fake, _setup_context, _autograd
)
