"""varlen_attention: the launchers, and which of the kernels they take.

Batches whose sequences have at most 128 tokens go to attention_short.py, others to attention_tiled.py.
"""

import torch

from bertfast.kernels import attention_short, attention_tiled


def precision(dtype: torch.dtype) -> str:
    """How float32 products are calculated: as PyTorch has been told to, by the newer of its settings or the older."""
    settings = torch.backends.cuda.matmul
    tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def _tiled(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed):
    sequences, how = cu_seqlens.shape[0] - 1, precision(qkv.dtype)
    lengths = sequences, max_seqlen, max_seqlen
    return attention_tiled.Attention(*qkv.unbind(1), None, cu_seqlens, order, *lengths, scale, dropout_p, seed, how)


def varlen_attention_fwd(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, save):
    """(out, lse): softmax(scale q k^T) v inside each sequence, and the log-sum-exp where it is to be saved."""
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    cu_seqlens, order = cu_seqlens.contiguous(), None if order is None else order.contiguous()
    tokens, _, heads, size = qkv.shape
    out = qkv.new_empty(tokens, heads, size)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device) if save else None
    arguments = qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed
    if attention_short.fits(qkv, max_seqlen, backward=False):
        attention_short.forward(*arguments, out, lse)
    else:
        attention_tiled.forward(_tiled(*arguments), out, lse)
    return out, lse


def varlen_attention_bwd(dout, qkv, cu_seqlens, max_seqlen, order, out, lse, scale, dropout_p, seed):
    """The gradient of qkv, (tokens, 3, heads, head_size)."""
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    cu_seqlens, order = cu_seqlens.contiguous(), None if order is None else order.contiguous()
    dout, out = dout.contiguous(), out.contiguous()
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    arguments = qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed
    if attention_short.fits(qkv, max_seqlen, backward=True):
        attention_short.backward(*arguments, dout, out, lse, dqkv)
    else:
        attention_tiled.backward(_tiled(*arguments), dout, out, lse, *dqkv.unbind(1))
    return dqkv
