"""residual_layer_norm against PyTorch's sums, dropout and norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import BANDWIDTH_GOAL, DROPOUT, Case, Peer, draw_seed, element_size, normal, work
from bertfast import ops, reference


def residual_layer_norm(
    tokens: int, hidden: int, dtype: str, direction: str, device: str, dropout: bool = False, headline: bool = False
) -> Case:
    """LayerNorm(dropout(x + x_bias) + residual)."""
    p = DROPOUT if dropout else 0.0

    def make(g: torch.Generator) -> tuple:
        vectors = [normal(g, hidden, dtype=dtype, scale=0.3, shift=s) for s in (1.0, 0.0, 0.0)]
        return *(normal(g, tokens, hidden, dtype=dtype) for _ in range(2)), *vectors, draw_seed(g)

    def ours(x, residual, weight, bias, x_bias, seed):
        return ops.residual_layer_norm(x, residual, weight, bias, 1e-12, x_bias=x_bias, dropout_p=p, seed=seed)

    def gold(x, residual, weight, bias, x_bias, seed):
        return reference.residual_layer_norm(x, residual, weight, bias, 1e-12, x_bias, p, seed)

    def plain(x, residual, weight, bias, x_bias, seed):
        y = x + x_bias
        y = y * _multiplier(y, seed) if dropout else y
        return F.layer_norm(y + residual, (hidden,), weight, bias, 1e-12)

    def eager(x, residual, weight, bias, x_bias, seed):
        return F.layer_norm(F.dropout(x + x_bias, DROPOUT, dropout) + residual, (hidden,), weight, bias, 1e-12)

    # Read x and residual, write the output; backward: read dout, x and residual, write the gradients of both, which
    # are one tensor without dropout.
    matrices = work(direction, 3, 5 if dropout else 4)
    return Case(
        op="residual_layer_norm" + (" dropout" if dropout else ""),
        shape=f"{tokens}x{hidden}",
        dtype=dtype,
        direction=direction,
        device=device,
        make=make,
        ours=ours,
        gold=gold,
        plain=plain,
        peers={"eager": Peer(eager)},
        flops=0,
        nbytes=matrices * tokens * hidden * element_size(dtype),
        compiled=eager,
        headline=headline,
        goals=BANDWIDTH_GOAL if headline else {},
    )


def _multiplier(x: Tensor, seed: Tensor) -> Tensor:
    """The multipliers of `reference.dropout` in x's dtype."""
    return reference.dropout(torch.ones(x.shape, device=x.device), DROPOUT, seed).to(x.dtype)
