"""masked_attention: the launchers. The kernels are those of attention_tiled.py, over rectangles and with a mask."""

import torch

from bertfast.kernels import attention_tiled
from bertfast.kernels.attention import precision


def _attention(q, k, v, mask, scale, dropout_p, seed):
    """The mask is read through strides of 0 where it broadcasts."""
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        mask = mask.expand(*q.shape[:3], keys)
    lengths = batch, queries, keys
    how = precision(q.dtype)
    return attention_tiled.Attention(q, k, v, mask, None, None, *lengths, scale, dropout_p, seed, how)


def masked_attention_fwd(q, k, v, mask, scale, dropout_p, seed, save):
    """(out, lse): softmax(scale q k^T + mask) v, and the log-sum-exp, inf for no key, where it is to be saved."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if save else None
    attention_tiled.forward(_attention(q, k, v, mask, scale, dropout_p, seed), out, lse)
    return out, lse


def masked_attention_bwd(dout, q, k, v, mask, out, lse, scale, dropout_p, seed):
    """The gradients (dq, dk, dv)."""
    gradients = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    attention = _attention(q, k, v, mask, scale, dropout_p, seed)
    attention_tiled.backward(attention, dout.contiguous(), out.contiguous(), lse, *gradients)
    return gradients
