"""residual_layer_norm: LayerNorm(dropout(x + x_bias) + residual), the step between a GEMM and the next one."""

import torch
from torch import Tensor

from bertfast import backend, reference
from bertfast.ops import cpu, cuda, registry

WIDEST_IN_TRITON = 4096


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual) * weight + bias.

    Args:
        x, residual: (tokens, hidden), one dtype and device.
        weight, bias: (hidden,), same dtype.
        eps: added to the variance.
        x_bias: (hidden,) or None, the bias of the GEMM that made x.
        dropout_p: probability in [0, 1), in steps of 2^-16.
        seed: (1,) int64; drawn from torch's generator where None. The mask is recomputed in the backward.

    Returns (tokens, hidden) in x's dtype. Statistics are float32 and the result is rounded once. Raises
    ValueError / TypeError where shapes, dtypes or devices do not fit. Source: Ba et al. 2016; the order of
    dropout, sum and norm is BERT's (post-LN).
    """
    registry.check_axes("x", x, "tokens", "hidden")
    eps = registry.number("eps", eps)
    hidden = x.shape[1:]
    likes = {"residual": (residual, x.shape), "weight": (weight, hidden), "bias": (bias, hidden)}
    registry.check_like(x, **likes if x_bias is None else likes | {"x_bias": (x_bias, hidden)})
    dropout_p, seed = registry.dropout_arguments(dropout_p, seed, x.device)
    if registry.seen(x, residual, weight, bias, x_bias):
        return _op(x, residual, weight, bias, x_bias, eps, dropout_p, seed)[0]
    forward, _ = backend.implementation("residual_layer_norm", x, x.shape[1])
    return forward(x, residual, weight, bias, x_bias, eps, dropout_p, seed, False)[0]


def _cpu_forward(x, residual, weight, bias, x_bias, eps, dropout_p, seed, save):
    x, residual, weight, bias, x_bias = registry.dense(x, residual, weight, bias, x_bias)
    out, mean, rstd = torch.empty_like(x), *cpu.statistics(x.shape[0], save)
    tensors = (x, x_bias, residual, weight, bias, out, mean, rstd)
    cpu.launch("residual_layer_norm_fwd", x.dtype, *tensors, *x.shape, eps, *cpu.dropout(dropout_p, seed))
    return out, mean, rstd


def _cpu_backward(dout, x, residual, weight, x_bias, mean, rstd, eps, dropout_p, seed):
    dout, x, residual, weight, x_bias = registry.dense(dout, x, residual, weight, x_bias)
    dresidual, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    dx = torch.empty_like(x) if dropout_p > 0.0 else x.new_empty(0)
    dx_bias = torch.empty_like(weight) if x_bias is not None else x.new_empty(0)
    cpu.launch(
        "residual_layer_norm_bwd",
        x.dtype,
        *(dout, x, x_bias, residual, weight, mean, rstd),
        *(dx if dropout_p > 0.0 else None, dresidual, dx_bias if x_bias is not None else None, dweight, dbias),
        *x.shape,
        *cpu.dropout(dropout_p, seed),
    )
    return dx, dresidual, dweight, dbias, dx_bias


def _cuda_forward(x, residual, weight, bias, x_bias, eps, dropout_p, seed, save):
    x, residual, weight, bias, x_bias = registry.dense(x, residual, weight, bias, x_bias)
    out, mean, rstd = torch.empty_like(x), *cuda.statistics(x, x.shape[0], save)
    tensors = (x, x_bias, residual, weight, bias, out, mean, rstd)
    cuda.launch("residual_layer_norm_fwd", x, *tensors, *x.shape, eps, *cuda.dropout(dropout_p, seed))
    return out, mean, rstd


def _cuda_backward(dout, x, residual, weight, x_bias, mean, rstd, eps, dropout_p, seed):
    dout, x, residual, weight, x_bias = registry.dense(dout, x, residual, weight, x_bias)
    dresidual, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    dx = torch.empty_like(x) if dropout_p > 0.0 else x.new_empty(0)
    dx_bias = torch.empty_like(weight) if x_bias is not None else x.new_empty(0)
    cuda.launch(
        "residual_layer_norm_bwd",
        x,
        *(dout, x, x_bias, residual, weight, mean, rstd),
        *(dx if dropout_p > 0.0 else None, dresidual, dx_bias if x_bias is not None else None, dweight, dbias),
        cuda.column_sums(x, 3),
        *x.shape,
        *cuda.dropout(dropout_p, seed),
    )
    return dx, dresidual, dweight, dbias, dx_bias


def _reference_forward(x, residual, weight, bias, x_bias, eps, dropout_p, seed, save):
    out = reference.residual_layer_norm(x, residual, weight, bias, eps, x_bias, dropout_p, seed)
    if not save:
        return out, None, None
    return out, *reference.row_statistics(reference.residual_sum(x, residual, x_bias, dropout_p, seed), eps)


def _reference_backward(dout, x, residual, weight, x_bias, mean, rstd, eps, dropout_p, seed):
    gradients = reference.residual_layer_norm_backward(dout, x, residual, weight, eps, x_bias, dropout_p, seed)
    dx, dresidual, dweight, dbias, dx_bias = gradients
    empty = x.new_empty(0)
    return dx if dropout_p > 0.0 else empty, dresidual, dweight, dbias, empty.clone() if x_bias is None else dx_bias


def refuse_wide_rows(dtype: torch.dtype, hidden: int) -> str | None:
    """Why Triton's kernels cannot have rows of this many columns: they keep whole rows in registers."""
    if hidden <= WIDEST_IN_TRITON:
        return None
    return f"has kernels for rows of up to {WIDEST_IN_TRITON} columns, not {hidden}"


backend.register("residual_layer_norm", "cuda", (_cuda_forward, _cuda_backward))
backend.register(
    "residual_layer_norm",
    "triton",
    backend.Later("bertfast.kernels.norm", "residual_layer_norm_fwd", "residual_layer_norm_bwd"),
    refuse=refuse_wide_rows,
)
backend.register("residual_layer_norm", "cpu", (_cpu_forward, _cpu_backward))
backend.register("residual_layer_norm", "reference", (_reference_forward, _reference_backward))


def _run(x, residual, weight, bias, x_bias, eps, dropout_p, seed):
    forward, _ = backend.implementation("residual_layer_norm", x, x.shape[1])
    return forward(x, residual, weight, bias, x_bias, eps, dropout_p, seed, True)


def _fake(x, residual, weight, bias, x_bias, eps, dropout_p, seed):
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


def _run_backward(dout, x, residual, weight, x_bias, mean, rstd, eps, dropout_p, seed):
    _, backward = backend.implementation("residual_layer_norm", x, x.shape[1])
    return backward(dout, x, residual, weight, x_bias, mean, rstd, eps, dropout_p, seed)


def _fake_backward(dout, x, residual, weight, x_bias, mean, rstd, eps, dropout_p, seed):
    empty = x.new_empty(0)
    return (
        x.new_empty(x.shape) if dropout_p > 0.0 else empty,
        x.new_empty(x.shape),
        torch.empty_like(weight),
        torch.empty_like(weight),
        x.new_empty(0) if x_bias is None else torch.empty_like(weight),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, x_bias, ctx.eps, ctx.dropout_p, seed = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, x_bias, mean, rstd, seed)


def _autograd(ctx, dout, dmean, drstd):
    *saved, seed = ctx.saved_tensors
    dx, dresidual, dweight, dbias, dx_bias = _op_backward(dout, *saved, ctx.eps, ctx.dropout_p, seed)
    dx = dx if ctx.dropout_p > 0.0 else dresidual
    return dx, dresidual, dweight, dbias, dx_bias if ctx.needs_input_grad[4] else None, None, None, None


_op_backward = registry.define(
    "residual_layer_norm_backward(Tensor dout, Tensor x, Tensor residual, Tensor weight, Tensor? x_bias, Tensor mean,"
    " Tensor rstd, float eps, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_op = registry.define(
    "residual_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? x_bias, float eps,"
    " float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _autograd,
)
