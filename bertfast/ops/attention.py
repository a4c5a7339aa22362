"""varlen_attention: softmax(q k^T / sqrt(D)) v inside each sequence of a packed batch. masked_attention: the same over
rectangles, for what a mask can say and borders cannot."""

import functools

import torch
from torch import Tensor

from bertfast import backend, native, reference
from bertfast.ops import cpu, cuda, registry


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    order: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(scale q k^T)) v inside each sequence, for each head; no token sees another sequence.

    Args:
        qkv: (tokens, 3, heads, head_size), the last axis dense; a view of the QKV GEMM's output fits as it is.
        cu_seqlens: (sequences + 1,) int32, rising from 0 to tokens: sequence b is cu_seqlens[b] .. cu_seqlens[b + 1].
            Lengths of 0 are allowed.
        max_seqlen: the longest length, or any number that is not smaller; without it a GPU has to be waited for.
            `Packing.max_seqlen` knows it.
        order: (sequences,) int32, the order in which a GPU begins the sequences, as in `Packing.order`: longest first
            keeps it busy to the end. The result does not depend on it.
        scale: defaults to 1 / sqrt(head_size).
        dropout_p: probability in [0, 1) that a probability is dropped, in steps of 2^-8 as in FlashAttention: 0.1 is
            26 / 256, and the kept ones are divided by 1 - 26 / 256; below 1 / 512 nothing is dropped.
        seed: as in `residual_layer_norm`.

    Returns (tokens, heads, head_size), dense, in qkv's dtype; scores and softmax are float32. The backward recomputes
    the probabilities from the log-sum-exp of each row. Raises ValueError / TypeError where shapes, dtypes or devices
    do not fit, or (on the CPU) where cu_seqlens is not what it says: on a GPU a wrong cu_seqlens or max_seqlen is not
    noticed. Sources: Vaswani et al. 2017; the backward is
    that of Dao et al. 2022, without the tiling.
    """
    registry.check_axes("qkv", qkv, "tokens", "3", "heads", "head_size")
    if qkv.shape[1] != 3 or not qkv.shape[3]:
        raise ValueError(f"qkv must be (tokens, 3, heads, head_size), not of shape {tuple(qkv.shape)}")
    registry.check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != qkv.device:
        raise ValueError(
            f"cu_seqlens must be (sequences + 1,) int32 on {qkv.device}, "
            f"not {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    sequences = cu_seqlens.shape[0] - 1
    if order is not None:
        registry.check_tensor("order", order)
        if order.dtype != torch.int32 or order.shape != (sequences,) or order.device != qkv.device:
            raise ValueError(
                f"order must be ({sequences},) int32 on {qkv.device}, not {tuple(order.shape)} {order.dtype}"
            )
    if max_seqlen is not None:
        if not isinstance(max_seqlen, (int, torch.SymInt)):
            raise TypeError(f"max_seqlen must be an integer, not a {type(max_seqlen).__name__}")
        if not 0 <= max_seqlen < 2**63:
            raise ValueError(f"max_seqlen must be at least 0 and below 2^63, not {max_seqlen}")
    scale = _scale(scale, qkv.shape[3])
    max_seqlen = _UNKNOWN if max_seqlen is None else max_seqlen
    dropout_p, seed = registry.dropout_arguments(dropout_p, seed, qkv.device)
    if registry.seen(qkv):
        return _op(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed)[0]
    return _forward(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, False)[0]


_UNKNOWN = -1


def _scale(scale: float | None, head_size: int) -> float:
    return head_size**-0.5 if scale is None else registry.number("scale", scale)


def _longest(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> int:
    """max_seqlen, found out where the caller did not know and the device's kernels want to."""
    if max_seqlen != _UNKNOWN or (qkv.device.type == "cpu" and backend.current() not in ("cuda", "triton")):
        return max_seqlen
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0


def _shape(qkv: Tensor, max_seqlen: int) -> tuple[int, int] | None:
    """The class of shapes that the choice of a backend depends on: head size, and a power of two of the length."""
    return None if max_seqlen == _UNKNOWN else (qkv.shape[3], 1 << max(max_seqlen - 1, 0).bit_length())


def _forward(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, save):
    if qkv.device.type == "cpu":
        _check_borders(cu_seqlens, qkv.shape[0])
    max_seqlen = _longest(qkv, cu_seqlens, max_seqlen)
    run = backend.implementation("varlen_attention", qkv, _shape(qkv, max_seqlen))
    return run(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, save)


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


def _cpu_forward(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, save):
    qkv, cu_seqlens = qkv if qkv.stride(3) == 1 else qkv.contiguous(), cu_seqlens.contiguous()
    tokens, _, heads, size = qkv.shape
    out = qkv.new_empty(tokens, heads, size)
    lse = torch.empty(heads, tokens, dtype=torch.float32) if save else None
    arguments = _cpu_arguments(qkv, cu_seqlens, out, lse)
    cpu.launch("varlen_attention_fwd", qkv.dtype, *arguments, scale, *cpu.dropout(dropout_p, seed, reference.KEY_BITS))
    return out, lse


def _cpu_backward(dout, qkv, cu_seqlens, max_seqlen, order, out, lse, scale, dropout_p, seed):
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    dout, cu_seqlens, out = registry.dense(dout, cu_seqlens, out)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    arguments = _cpu_arguments(qkv, cu_seqlens, out, lse, dqkv)
    cpu.launch(
        "varlen_attention_bwd", qkv.dtype, dout, *arguments, scale, *cpu.dropout(dropout_p, seed, reference.KEY_BITS)
    )
    return dqkv


# Of the CUDA kernel, which has whole sequences in registers: `_shape` names powers of two.
_LONGEST = 128


def _cuda_refusal(dtype, shape):
    head_size, length = shape
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes attention in bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_size not in (32, 64):
        return f"computes attention for head sizes 32 and 64, not {head_size}"
    return None if length <= _LONGEST else f"computes attention for sequences of at most {_LONGEST} tokens"


@functools.cache
def _has_warpgroups(device: torch.device) -> bool:
    """Whether the kernel for wgmma runs there: it is machine code of sm_90a and runs on 9.0 alone."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and "90a" in native.cuda.architectures()
    )


def _cuda_forward(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, save):
    # The kernel reads 16 bytes at a time.
    if qkv.stride(3) != 1 or qkv.data_ptr() % 16 or any(s * qkv.element_size() % 16 for s in qkv.stride()[:3]):
        qkv = qkv.clone(memory_format=torch.contiguous_format)
    tokens, _, heads, size = qkv.shape
    out = qkv.new_empty(tokens, heads, size)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device) if save else None
    cuda.launch(
        "varlen_attention_fwd",
        qkv,
        *(qkv, *qkv.stride()[:3], cu_seqlens.contiguous(), None if order is None else order.contiguous(), out, lse),
        *(tokens, cu_seqlens.shape[0] - 1, heads, size, max_seqlen, scale),
        *cuda.dropout(dropout_p, seed, reference.KEY_BITS),
        _has_warpgroups(qkv.device),
    )
    return out, lse


def _reference_forward(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, save):
    if qkv.device.type != "cpu":
        _check_borders(cu_seqlens, qkv.shape[0])
    out = reference.varlen_attention(qkv, cu_seqlens, scale, dropout_p, seed)
    return out.contiguous(), reference.varlen_attention_lse(qkv, cu_seqlens, scale) if save else None


def _reference_backward(dout, qkv, cu_seqlens, max_seqlen, order, out, lse, scale, dropout_p, seed):
    return reference.varlen_attention_backward(dout, qkv, cu_seqlens, scale, dropout_p, seed).contiguous()


def _triton_refusal(dtype, shape):
    head_size, _ = shape
    return None if head_size <= 128 else f"computes attention for head sizes of at most 128, not {head_size}"


def _triton(name: str) -> backend.Later:
    return backend.Later("bertfast.kernels.attention", name)


# Forward and backward are chosen apart: not every backend has both, and all of them agree on what is saved between.
backend.register("varlen_attention", "cpu", _cpu_forward)
backend.register("varlen_attention", "cuda", _cuda_forward, _cuda_refusal)
backend.register("varlen_attention", "triton", _triton("varlen_attention_fwd"), _triton_refusal)
backend.register("varlen_attention", "reference", _reference_forward)
backend.register("varlen_attention_backward", "cpu", _cpu_backward)
backend.register("varlen_attention_backward", "triton", _triton("varlen_attention_bwd"), _triton_refusal)
backend.register("varlen_attention_backward", "reference", _reference_backward)


def _run(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed):
    return _forward(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, True)


def _fake(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed):
    tokens, _, heads, size = qkv.shape
    return qkv.new_empty(tokens, heads, size), qkv.new_empty(heads, tokens, dtype=torch.float32)


def _run_backward(dout, qkv, cu_seqlens, max_seqlen, order, out, lse, scale, dropout_p, seed):
    max_seqlen = _longest(qkv, cu_seqlens, max_seqlen)
    run = backend.implementation("varlen_attention_backward", qkv, _shape(qkv, max_seqlen))
    return run(dout, qkv, cu_seqlens, max_seqlen, order, out, lse, scale, dropout_p, seed)


def _fake_backward(dout, qkv, cu_seqlens, max_seqlen, order, out, lse, scale, dropout_p, seed):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen, order, ctx.scale, ctx.dropout_p, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, cu_seqlens, order, out, lse, seed)


def _autograd(ctx, dout, dlse):
    qkv, cu_seqlens, order, out, lse, seed = ctx.saved_tensors
    arguments = (dout, qkv, cu_seqlens, ctx.max_seqlen, order, out, lse, ctx.scale, ctx.dropout_p, seed)
    return _op_backward(*arguments), *(None,) * 6


_op_backward = registry.define(
    "varlen_attention_backward(Tensor dout, Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, Tensor? order,"
    " Tensor out, Tensor lse, float scale, float dropout_p, Tensor? seed) -> Tensor",
    _run_backward,
    _fake_backward,
)
_op = registry.define(
    "varlen_attention(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, Tensor? order, float scale, float dropout_p,"
    " Tensor? seed) -> (Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _autograd,
)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(scale q k^T + mask)) v for each head of each sequence of a rectangle.

    Args:
        q: (batch, heads, queries, head_size), with any strides.
        k, v: (batch, heads, keys, head_size) of q's dtype.
        mask: None, or what broadcasts to (batch, heads, queries, keys): boolean, true where the query sees the key, or
            floating-point and added to the scores, where anything below -1e30 means -inf. It is never expanded.
        scale: defaults to 1 / sqrt(head_size).
        dropout_p, seed: as in `varlen_attention`; sequence b of the rectangle has the mask of sequence b there.

    Returns (batch, heads, queries, head_size), dense, in q's dtype; scores and softmax are float32. A query that
    sees no key gives zeros and has a gradient of zeros. Raises ValueError / TypeError where
    shapes, dtypes or devices do not fit, and ValueError for a mask that wants a gradient: it has none here.
    """
    registry.check_axes("q", q, "batch", "heads", "queries", "head_size")
    registry.check_axes("k", k, "batch", "heads", "keys", "head_size")
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    if not size:
        raise ValueError(f"q must be (batch, heads, queries, head_size), not of shape {tuple(q.shape)}")
    registry.check_like(q, k=(k, (batch, heads, keys, size)), v=(v, (batch, heads, keys, size)))
    if mask is not None:
        _check_mask(mask, q, (batch, heads, queries, keys))
    scale = _scale(scale, size)
    dropout_p, seed = registry.dropout_arguments(dropout_p, seed, q.device)
    if registry.seen(q, k, v):
        return _masked_op(q, k, v, mask, scale, dropout_p, seed)[0]
    forward, _ = backend.implementation("masked_attention", q, (size, 0))
    return forward(q, k, v, mask, scale, dropout_p, seed, False)[0]


def _check_mask(mask: Tensor, q: Tensor, shape: tuple[int, ...]) -> None:
    registry.check_tensor("mask", mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be boolean, or floating-point to be added, not {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device} where q is on {q.device}: move one of them with .to()")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask wants a gradient, and masked_attention has none for it: use torch's own attention")
    sizes = zip((1,) * (4 - mask.dim()) + tuple(mask.shape), shape, strict=False)
    if mask.dim() > 4 or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to {shape}")


def _reference_masked_forward(q, k, v, mask, scale, dropout_p, seed, save):
    out = reference.masked_attention(q, k, v, mask, scale, dropout_p, seed)
    return out.contiguous(), reference.masked_attention_lse(q, k, mask, scale) if save else None


def _reference_masked_backward(dout, q, k, v, mask, out, lse, scale, dropout_p, seed):
    gradients = reference.masked_attention_backward(dout, q, k, v, mask, scale, dropout_p, seed)
    return tuple(gradient.contiguous() for gradient in gradients)


backend.register(
    "masked_attention",
    "triton",
    backend.Later("bertfast.kernels.masked_attention", "masked_attention_fwd", "masked_attention_bwd"),
    _triton_refusal,
)
backend.register("masked_attention", "reference", (_reference_masked_forward, _reference_masked_backward))


def _run_masked(q, k, v, mask, scale, dropout_p, seed):
    forward, _ = backend.implementation("masked_attention", q, (q.shape[3], 0))
    return forward(q, k, v, mask, scale, dropout_p, seed, True)


def _fake_masked(q, k, v, mask, scale, dropout_p, seed):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _run_masked_backward(dout, q, k, v, mask, out, lse, scale, dropout_p, seed):
    _, backward = backend.implementation("masked_attention", q, (q.shape[3], 0))
    return backward(dout, q, k, v, mask, out, lse, scale, dropout_p, seed)


def _fake_masked_backward(dout, q, k, v, mask, out, lse, scale, dropout_p, seed):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_masked_context(ctx, inputs, output):
    q, k, v, mask, ctx.scale, ctx.dropout_p, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, mask, out, lse, seed)


def _masked_autograd(ctx, dout, dlse):
    q, k, v, mask, out, lse, seed = ctx.saved_tensors
    gradients = _masked_op_backward(dout, q, k, v, mask, out, lse, ctx.scale, ctx.dropout_p, seed)
    return *gradients, None, None, None, None


_masked_op_backward = registry.define(
    "masked_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse,"
    " float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    _run_masked_backward,
    _fake_masked_backward,
)
_masked_op = registry.define(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float dropout_p, Tensor? seed)"
    " -> (Tensor, Tensor)",
    _run_masked,
    _fake_masked,
    _setup_masked_context,
    _masked_autograd,
)
