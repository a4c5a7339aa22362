"""varlen_attention: softmax(q k^T / sqrt(D)) v inside each sequence of a packed batch."""

import torch
from torch import Tensor

from bertfast import backend, reference
from bertfast.ops import cpu, registry


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(scale q k^T)) v inside each sequence, for each head; no token sees another sequence.

    Args:
        qkv: (tokens, 3, heads, head_size), the last axis dense; a view of the QKV GEMM's output fits as it is.
        cu_seqlens: (sequences + 1,) int32, rising from 0 to tokens: sequence b is cu_seqlens[b] .. cu_seqlens[b + 1].
            Lengths of 0 are allowed.
        scale: defaults to 1 / sqrt(head_size).
        dropout_p, seed: as in `residual_layer_norm`, on the probabilities.

    Returns (tokens, heads, head_size), dense, in qkv's dtype; scores and softmax are float32. The backward recomputes
    the probabilities from the log-sum-exp of each row. Raises ValueError / TypeError where shapes, dtypes or devices
    do not fit, or (on the CPU) where cu_seqlens is not what it says. Sources: Vaswani et al. 2017; the backward is
    that of Dao et al. 2022, without the tiling.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (tokens, 3, heads, head_size), not of shape {tuple(qkv.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != qkv.device:
        raise ValueError(
            f"cu_seqlens must be (sequences + 1,) int32 on {qkv.device}, "
            f"not {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    dropout_p, seed = registry.dropout_arguments(dropout_p, seed, qkv.device)
    if registry.seen(qkv):
        return _op(qkv, cu_seqlens, scale, dropout_p, seed)[0]
    forward, _ = backend.implementation("varlen_attention", qkv)
    return forward(qkv, cu_seqlens, scale, dropout_p, seed, False)[0]


def _check_borders(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise where a border is wrong: it would read another sequence, or memory that is not ours."""
    borders = cu_seqlens.tolist()
    if not borders or borders[0] != 0 or borders[-1] != tokens or borders != sorted(borders):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, not be {borders}")


def _cpu_arguments(qkv, cu_seqlens, out, lse, *gradient):
    """The launchers' arguments up to the sizes."""
    tokens, _, heads, size = qkv.shape
    sizes = (tokens, cu_seqlens.shape[0] - 1, heads, size)
    return (qkv, *qkv.stride()[:3], cu_seqlens, out, lse, *gradient, *sizes)


def _cpu_forward(qkv, cu_seqlens, scale, dropout_p, seed, save):
    _check_borders(cu_seqlens, qkv.shape[0])
    qkv, cu_seqlens = qkv if qkv.stride(3) == 1 else qkv.contiguous(), cu_seqlens.contiguous()
    tokens, _, heads, size = qkv.shape
    out = qkv.new_empty(tokens, heads, size)
    lse = torch.empty(heads, tokens, dtype=torch.float32) if save else None
    arguments = _cpu_arguments(qkv, cu_seqlens, out, lse)
    cpu.launch("varlen_attention_fwd", qkv.dtype, *arguments, scale, *cpu.dropout(dropout_p, seed))
    return out, lse


def _cpu_backward(dout, qkv, cu_seqlens, out, lse, scale, dropout_p, seed):
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    dout, cu_seqlens, out = registry.dense(dout, cu_seqlens, out)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    arguments = _cpu_arguments(qkv, cu_seqlens, out, lse, dqkv)
    cpu.launch("varlen_attention_bwd", qkv.dtype, dout, *arguments, scale, *cpu.dropout(dropout_p, seed))
    return dqkv


def _reference_forward(qkv, cu_seqlens, scale, dropout_p, seed, save):
    _check_borders(cu_seqlens, qkv.shape[0])
    out = reference.varlen_attention(qkv, cu_seqlens, scale, dropout_p, seed)
    # The reference's backward computes everything anew; lse only keeps the op's signature.
    return out.contiguous(), qkv.new_zeros(qkv.shape[2], qkv.shape[0], dtype=torch.float32)


def _reference_backward(dout, qkv, cu_seqlens, out, lse, scale, dropout_p, seed):
    return reference.varlen_attention_backward(dout, qkv, cu_seqlens, scale, dropout_p, seed).contiguous()


backend.register("varlen_attention", "cpu", (_cpu_forward, _cpu_backward))
backend.register("varlen_attention", "reference", (_reference_forward, _reference_backward))


def _run(qkv, cu_seqlens, scale, dropout_p, seed):
    forward, _ = backend.implementation("varlen_attention", qkv)
    return forward(qkv, cu_seqlens, scale, dropout_p, seed, True)


def _fake(qkv, cu_seqlens, scale, dropout_p, seed):
    tokens, _, heads, size = qkv.shape
    return qkv.new_empty(tokens, heads, size), qkv.new_empty(heads, tokens, dtype=torch.float32)


def _run_backward(dout, qkv, cu_seqlens, out, lse, scale, dropout_p, seed):
    _, backward = backend.implementation("varlen_attention", qkv)
    return backward(dout, qkv, cu_seqlens, out, lse, scale, dropout_p, seed)


def _fake_backward(dout, qkv, cu_seqlens, out, lse, scale, dropout_p, seed):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    qkv, cu_seqlens, ctx.scale, ctx.dropout_p, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, cu_seqlens, out, lse, seed)


def _autograd(ctx, dout, dlse):
    *saved, seed = ctx.saved_tensors
    return _op_backward(dout, *saved, ctx.scale, ctx.dropout_p, seed), None, None, None, None


_op_backward = registry.define(
    "varlen_attention_backward(Tensor dout, Tensor qkv, Tensor cu_seqlens, Tensor out, Tensor lse, float scale,"
    " float dropout_p, Tensor? seed) -> Tensor",
    _run_backward,
    _fake_backward,
)
_op = registry.define(
    "varlen_attention(Tensor qkv, Tensor cu_seqlens, float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _autograd,
)
