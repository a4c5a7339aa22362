"""bias_gelu against PyTorch's sum and GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import BANDWIDTH_GOAL, Case, Peer, element_size, normal, work
from bertfast import ops, reference


def bias_gelu(tokens: int, columns: int, dtype: str, direction: str, device: str, headline: bool = False) -> Case:
    """GELU(x + bias), the erf form."""

    def make(g: torch.Generator) -> tuple:
        return normal(g, tokens, columns, dtype=dtype, scale=2.0), normal(g, columns, dtype=dtype)

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    # Read x, write the output; backward: read dout and x, write dx.
    matrices = work(direction, 2, 3)
    return Case(
        op="bias_gelu",
        shape=f"{tokens}x{columns}",
        dtype=dtype,
        direction=direction,
        device=device,
        make=make,
        ours=ops.bias_gelu,
        gold=reference.bias_gelu,
        plain=eager,
        peers={"eager": Peer(eager)},
        flops=0,
        nbytes=matrices * tokens * columns * element_size(dtype),
        compiled=eager,
        headline=headline,
        goals=BANDWIDTH_GOAL if headline else {},
    )
