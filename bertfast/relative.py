"""Attention with a bias for each head and each distance of two tokens, as MPNet has it, on packed tokens.

PyTorch's attention, once for each run of sequences of one length: no kernel of ours takes a bias yet.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def biased_attention(qkv: Tensor, lengths: Sequence[int], bias: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    """softmax(q kᵀ · scale + bias) v inside each sequence, with dropout on the probabilities.

    Args:
        qkv: (tokens, 3, heads, head_size), all sequences behind one another.
        lengths: tokens of each sequence.
        bias: (1, heads, n, n) for at least the longest of them, a function of the distance of query and key alone.

    Returns (tokens, heads, head_size) in qkv's dtype. Source: Song et al. 2020 (MPNet), after Raffel et al. 2020.
    """
    bias, parts, begin = bias.to(qkv.dtype), [qkv.new_empty(0, *qkv.shape[2:])], 0
    for length, run in itertools.groupby(lengths):
        end = begin + length * len(list(run))
        if end > begin:
            q, k, v = qkv[begin:end].unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)
            part = F.scaled_dot_product_attention(
                q, k, v, bias[..., :length, :length], dropout_p=dropout_p, scale=scale
            )
            parts.append(part.transpose(1, 2).flatten(0, 1))
        begin = end
    return torch.cat(parts)
