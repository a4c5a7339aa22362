"""masked_attention against PyTorch's attention with the same mask."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.attention import rectangular, validity
from benchmarks.cases.case import Case, Peer, element_size, normal, work
from bertfast import ops, reference


def masked_attention(
    lengths: Sequence[int], heads: int, size: int, dtype: str, direction: str, device: str, name: str
) -> Case:
    """softmax(q k^T / sqrt(D)) v over a rectangle, whose mask hides the keys behind the end of each sequence."""
    sequences, longest = len(lengths), max(lengths)
    mask = validity(lengths)[:, None, None].to(device)

    def make(g: torch.Generator) -> tuple:
        return tuple(normal(g, sequences, heads, longest, size, dtype=dtype) for _ in range(3))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.masked_attention(q, k, v, mask)

    def gold(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.masked_attention(q, k, v, mask)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    # As in varlen_attention, but every query of the rectangle sees the valid keys, and the mask is read.
    pairs = longest * sum(lengths)
    matrix = sequences * longest * heads * size * element_size(dtype)
    return Case(
        op="masked_attention",
        shape=f"{name} {heads}x{size}",
        dtype=dtype,
        direction=direction,
        device=device,
        make=make,
        ours=ours,
        gold=gold,
        plain=plain,
        peers={name: Peer(function) for name, function in rectangular(device, mask, 0.0).items()},
        flops=work(direction, 4.0, 10.0) * pairs * heads * size,
        nbytes=work(direction, 4, 8) * matrix + work(direction, 1, 1) * mask.numel(),
        gpu_backends=("triton", "reference"),
    )
