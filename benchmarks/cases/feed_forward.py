"""feed_forward against PyTorch's two GEMMs with GELU between them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import Case, Peer, element_size, normal, work
from bertfast import ops, reference


def feed_forward(
    tokens: int, hidden: int, wide: int, dtype: str, direction: str, device: str, headline: bool = False
) -> Case:
    """GELU(x W1^T + b1) W2^T, the erf form. Weights are not packed, as in training."""

    def make(g: torch.Generator) -> tuple:
        up, down = normal(g, wide, hidden, dtype=dtype, scale=hidden**-0.5), normal(g, hidden, wide, dtype=dtype)
        return normal(g, tokens, hidden, dtype=dtype), up, normal(g, wide, dtype=dtype), down * wide**-0.5

    def eager(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up, bias)), down)

    # Read x and both weights, write the output; backward: read dout, x, what goes into GELU and the weights, write dx
    # and the weights' gradients.
    rows, weights, activations = tokens * hidden, 2 * hidden * wide, tokens * wide
    elements = work(direction, 2 * rows + weights, 3 * rows + activations + 2 * weights)
    return Case(
        op="feed_forward",
        shape=f"{tokens}x{wide}x{hidden}",
        dtype=dtype,
        direction=direction,
        device=device,
        make=make,
        ours=ops.feed_forward,
        gold=reference.feed_forward,
        plain=eager,
        peers={"eager": Peer(eager)},
        flops=work(direction, 4.0, 8.0) * tokens * hidden * wide,
        nbytes=elements * element_size(dtype),
        compiled=eager,
        headline=headline,
    )
