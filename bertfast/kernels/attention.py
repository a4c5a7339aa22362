"""varlen_attention: the launchers, and which of the kernels and tiles they take.

Batches of sequences of up to 128 tokens go to attention_short.py, longer ones to attention_tiled.py. Both calculate a
sequence that has a single tile of keys in the same way, so that the choice does not show in its result.
"""

from typing import NamedTuple

import torch
import triton

from bertfast.kernels import attention_short, dropout, hardware
from bertfast.kernels.attention_short import LOG2_E


class Short(NamedTuple):
    """How the kernels for short sequences are compiled, by the number of tokens that none of them exceeds."""

    warps: int
    registers: int | None  # that a thread may have, so that more programs fit on a multiprocessor


def precision(dtype: torch.dtype) -> str:
    """How float32 products are calculated: as PyTorch has been told to, by the newer of its settings or the older."""
    settings = torch.backends.cuda.matmul
    tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def _longest(max_seqlen: int) -> int:
    return max(16, triton.next_power_of_2(max_seqlen))


def varlen_attention_fwd(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, save):
    """(out, lse): softmax(scale q k^T) v inside each sequence, and the log-sum-exp where it is to be saved."""
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    tokens, _, heads, size = qkv.shape
    out = qkv.new_empty(tokens, heads, size)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device) if save else None
    cu_seqlens, order = cu_seqlens.contiguous(), None if order is None else order.contiguous()
    sequences = cu_seqlens.shape[0] - 1
    block_size = max(16, triton.next_power_of_2(size))
    longest = _longest(max_seqlen)
    groups = triton.cdiv(heads, 64 // min(longest, 64))
    parts = 2 if longest == 128 and sequences * groups < 2 * hardware.multiprocessors(qkv.device) else 1
    threshold, multiplier = dropout.settings(dropout_p, seed)
    attention_short._short_attention_fwd_kernel[(sequences * groups * parts,)](
        *(qkv, cu_seqlens, order, seed, out, lse, tokens, heads, groups, *qkv.stride()[:3]),
        *(abs(scale) * LOG2_E.value, threshold, multiplier, size, block_size, longest, parts),
        *(scale < 0, precision(qkv.dtype)),
        num_warps=4,
    )
    return out, lse


def varlen_attention_bwd(dout, qkv, cu_seqlens, max_seqlen, order, out, lse, scale, dropout_p, seed):
    """The gradient of qkv, (tokens, 3, heads, head_size)."""
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    dout, out = dout.contiguous(), out.contiguous()
    tokens, _, heads, size = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    cu_seqlens, order = cu_seqlens.contiguous(), None if order is None else order.contiguous()
    sequences = cu_seqlens.shape[0] - 1
    block_size = max(16, triton.next_power_of_2(size))
    longest = _longest(max_seqlen)
    groups = triton.cdiv(heads, 64 // min(longest, 64))
    threshold, multiplier = dropout.settings(dropout_p, seed)
    attention_short._short_attention_bwd_kernel[(sequences * groups,)](
        *(dout, qkv, cu_seqlens, order, seed, out, lse, dqkv, tokens, heads, groups, *qkv.stride()[:3]),
        *(scale, abs(scale) * LOG2_E.value, threshold, multiplier, size, block_size, longest),
        *(scale < 0, precision(qkv.dtype)),
        num_warps=8 if longest == 128 else 4,
    )
    return dqkv
