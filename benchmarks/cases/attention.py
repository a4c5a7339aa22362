"""varlen_attention against PyTorch's attention: on the same tokens, padded where they are ragged."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.case import (
    BOTH,
    DROPOUT,
    FORWARD,
    Case,
    Function,
    Peer,
    draw_seed,
    element_size,
    normal,
    work,
)
from bertfast import ops, reference

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def varlen_attention(
    lengths: Sequence[int],
    heads: int,
    size: int,
    dtype: str,
    direction: str,
    device: str,
    name: str,
    dropout: bool = False,
) -> Case:
    """dropout(softmax(q k^T / sqrt(D))) v inside each sequence.

    Most of the others are given query, key and value apart and already padded, which is not timed.
    """
    tokens, longest, sequences = sum(lengths), max(lengths), len(lengths)
    p = DROPOUT if dropout else 0.0
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    valid = validity(lengths).to(device)
    full = all(length == longest for length in lengths)
    order = torch.tensor(lengths).argsort(descending=True).to(torch.int32).to(device)

    def make(g: torch.Generator) -> tuple:
        return normal(g, tokens, 3, heads, size, dtype=dtype), draw_seed(g)

    def ours(qkv: Tensor, seed: Tensor) -> Tensor:
        return ops.varlen_attention(
            qkv, borders, max_seqlen=longest, order=order, dropout_p=p, seed=seed if dropout else None
        )

    def gold(qkv: Tensor, seed: Tensor) -> Tensor:
        return reference.varlen_attention(qkv, borders, None, p, seed)

    def plain(qkv: Tensor, seed: Tensor) -> Tensor:
        outputs = []
        for b, part in enumerate(qkv.split(list(lengths))):
            q, k, v = part.permute(1, 2, 0, 3)
            weights = torch.softmax(q @ k.transpose(1, 2) * size**-0.5, dim=-1)
            outputs.append((weights * reference._attention_multiplier(weights, b, p, seed) @ v).transpose(0, 1))
        return torch.cat(outputs)

    def padded(qkv: Tensor, seed: Tensor) -> tuple:
        rectangle = qkv.new_zeros(sequences, longest, 3, heads, size)
        rectangle[valid] = qkv.detach()
        parts = (t.contiguous().transpose(1, 2) for t in rectangle.unbind(2))
        return tuple(t.requires_grad_(qkv.requires_grad) for t in parts)

    def one_by_one(qkv: Tensor, seed: Tensor) -> Tensor:
        parts = (part.permute(1, 2, 0, 3)[:, None] for part in qkv.split(list(lengths)))
        return torch.cat([F.scaled_dot_product_attention(*part, dropout_p=p)[0].transpose(0, 1) for part in parts])

    def nested(qkv: Tensor, seed: Tensor) -> tuple:
        offsets = borders.long()
        parts = (
            torch.nested.nested_tensor_from_jagged(t.detach().contiguous(), offsets, max_seqlen=longest)
            for t in qkv.unbind(1)
        )
        return tuple(t.requires_grad_(qkv.requires_grad) for t in parts)

    def jagged(which: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(which):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).values()

    mask = None if full else valid[:, None, None]
    peers = {name: Peer(function, padded) for name, function in rectangular(device, mask, p).items()}
    if not full and device == "cpu":
        peers["sdpa one by one"] = Peer(one_by_one)
    elif not full:
        for n in ("sdpa flash", "sdpa efficient"):
            peers[f"{n} nested"] = Peer(functools.partial(jagged, SDPA[n]), nested, captured=False)
    # Two products of every query with every key of its sequence forward, five backward. Forward: read q, k and v, write
    # the output; backward: read these four and dout, write dq, dk and dv.
    pairs = sum(length * length for length in lengths)
    return Case(
        op="varlen_attention" + (" dropout" if dropout else ""),
        shape=f"{name} {heads}x{size}",
        dtype=dtype,
        direction=direction,
        device=device,
        make=make,
        ours=ours,
        gold=gold,
        plain=plain,
        peers=peers,
        flops=work(direction, 4.0, 10.0) * pairs * heads * size,
        nbytes=work(direction, 4, 8) * tokens * heads * size * element_size(dtype),
        gpu_backends=("cuda", "triton"),  # the reference goes through the sequences one by one
        goals=_goals(longest, dtype, direction, dropout),
    )


def validity(lengths: Sequence[int]) -> Tensor:
    """(sequences, longest) bool: which tokens of the padded rectangle are valid."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def rectangular(device: str, mask: Tensor | None, p: float) -> dict[str, Function]:
    """PyTorch's attention of (batch, heads, length, size): by each of its backends on a GPU, as it chooses on a CPU.

    mask: broadcasts to (batch, heads, length, length), true where a query sees a key.
    """

    def sdpa(which: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)

    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        return F.dropout(torch.softmax(scores, dim=-1), p, p > 0.0) @ v

    if device == "cpu":
        return {"eager": eager, "sdpa": chosen}
    return {name: functools.partial(sdpa, which) for name, which in SDPA.items()}


def _goals(longest: int, dtype: str, direction: str, dropout: bool) -> dict[str, float]:
    if longest <= 512 and dtype != "float32":
        if direction == FORWARD and not dropout:
            return {"against the best of sdpa": 1.5 if longest <= 128 else 1.0}
        if direction == BOTH and dropout:
            return {"against the best of sdpa": 1.2}
    return {}
