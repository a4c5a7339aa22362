"""embed_layer_norm against PyTorch's look-ups, sums and norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import BANDWIDTH_GOAL, Case, Peer, element_size, normal, work
from bertfast import ops, reference

WORDS, POSITIONS, TYPES = 30000, 512, 2  # rows of the tables, about BERT's


def embed_layer_norm(tokens: int, hidden: int, dtype: str, direction: str, device: str, headline: bool = False) -> Case:
    """LayerNorm(word[ids] + position[positions] + type[types]), of sequences of 128 tokens."""
    length = min(128, tokens)

    def make(g: torch.Generator) -> tuple:
        ids = torch.randint(WORDS, (tokens,), generator=g, device=g.device)
        positions = torch.arange(tokens, device=g.device) % length
        types = torch.randint(TYPES, (tokens,), generator=g, device=g.device)
        tables = [normal(g, rows, hidden, dtype=dtype) for rows in (WORDS, POSITIONS, TYPES)]
        weight, bias = normal(g, hidden, dtype=dtype, shift=1.0), normal(g, hidden, dtype=dtype)
        return ids, positions, types, *tables, weight, bias

    def ours(*inputs: Tensor) -> Tensor:
        return ops.embed_layer_norm(*inputs, 1e-12)

    def eager(ids, positions, types, word, position, token_type, weight, bias):
        y = F.embedding(ids, word) + F.embedding(types, token_type) + F.embedding(positions, position)
        return F.layer_norm(y, (hidden,), weight, bias, 1e-12)

    # The rows of the words that are looked up, as many as are expected to differ, and of the other tables. Forward:
    # read ids and rows, write the output; backward: read ids, dout and rows, write three whole tables.
    found = WORDS * (1 - (1 - 1 / WORDS) ** tokens) + length + TYPES
    rows = work(direction, tokens + found, tokens + found + WORDS + POSITIONS + TYPES)
    ids = work(direction, 1, 1) * 3 * 8 * tokens
    return Case(
        op="embed_layer_norm",
        shape=f"{tokens}x{hidden}",
        dtype=dtype,
        direction=direction,
        device=device,
        make=make,
        ours=ours,
        gold=lambda *inputs: reference.embed_layer_norm(*inputs, 1e-12),
        plain=eager,
        peers={"eager": Peer(eager)},
        flops=0,
        nbytes=ids + rows * hidden * element_size(dtype),
        compiled=eager,
        headline=headline,
        goals=BANDWIDTH_GOAL if headline else {},
    )
