"""linear against PyTorch's GEMM: the up- and down-projections, and query, key and value."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import FORWARD, Case, Peer, element_size, normal, work
from bertfast import ops, reference
from bertfast.ops import PackedWeights


def projection(
    tokens: int,
    columns: int,
    depth: int,
    activation: str,
    dtype: str,
    device: str,
    direction: str = FORWARD,
    headline: bool = False,
    packed: bool = False,
) -> Case:
    """activation(x W^T + b) with one weight. packed: a packed copy of it is kept, as patched models do on a CPU."""

    def make(g: torch.Generator) -> tuple:
        weight = normal(g, columns, depth, dtype=dtype, scale=depth**-0.5)
        x, bias = normal(g, tokens, depth, dtype=dtype), normal(g, columns, dtype=dtype)
        return x, weight, bias, PackedWeights() if packed else None

    def ours(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights | None) -> Tensor:
        return ops.linear(x, weight, bias, activation=activation, packed=kept)

    def gold(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights | None) -> Tensor:
        return reference.linear(x, [weight], [bias], activation)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights | None) -> Tensor:
        y = F.linear(x, weight, bias)
        return y if activation == "none" else F.gelu(y)

    return Case(
        op=f"linear {activation}" + (" packed" if packed else ""),
        shape=f"{tokens}x{columns}x{depth}",
        dtype=dtype,
        direction=direction,
        device=device,
        make=make,
        ours=ours,
        gold=gold,
        plain=eager,
        peers={"eager": Peer(eager)},
        flops=_flops(direction, tokens, columns, depth),
        nbytes=_elements(direction, tokens, columns, depth, activation != "none") * element_size(dtype),
        compiled=eager,
        headline=headline,
    )


def qkv(tokens: int, hidden: int, dtype: str, device: str, direction: str = FORWARD, packed: bool = False) -> Case:
    """linear with three weights that lie apart: against three GEMMs, and one over a copy or over neighbours."""

    def make(g: torch.Generator) -> tuple:
        weights = [normal(g, hidden, hidden, dtype=dtype, scale=hidden**-0.5) for _ in range(3)]
        biases = [normal(g, hidden, dtype=dtype) for _ in range(3)]
        return normal(g, tokens, hidden, dtype=dtype), *weights, *biases, PackedWeights() if packed else None

    def ours(x: Tensor, *t: Tensor) -> Tensor:
        return ops.linear(x, t[:3], t[3:6], packed=t[6])

    def copied(x: Tensor, *t: Tensor) -> Tensor:
        return F.linear(x, torch.cat(t[:3]), torch.cat(t[3:6]))

    def apart(x: Tensor, *t: Tensor) -> tuple:
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(t[:3], t[3:6], strict=True))

    def neighbours(x: Tensor, *t: Tensor) -> tuple:
        return x, *torch.cat(t[:3]).split(hidden), *torch.cat(t[3:6]).split(hidden), None

    peers = {"three GEMMs": Peer(apart), "a copy of the weights": Peer(copied)}
    if device == "cuda" and direction == FORWARD:
        peers["neighbours"] = Peer(ours, neighbours)
    columns = 3 * hidden
    return Case(
        op="linear qkv" + (" packed" if packed else ""),
        shape=f"{tokens}x{columns}x{hidden}",
        dtype=dtype,
        direction=direction,
        device=device,
        make=make,
        ours=ours,
        gold=lambda x, *t: reference.linear(x, t[:3], t[3:6]),
        plain=copied,
        peers=peers,
        flops=_flops(direction, tokens, columns, hidden),
        nbytes=_elements(direction, tokens, columns, hidden, False) * element_size(dtype),
    )


def _flops(direction: str, tokens: int, columns: int, depth: int) -> float:
    """One GEMM forward, two backward."""
    return work(direction, 2.0, 4.0) * tokens * columns * depth


def _elements(direction: str, tokens: int, columns: int, depth: int, activated: bool) -> float:
    """Forward: read x and W, write the output; backward: read dout, x, W and what was activated, write dx and dW."""
    x, weight, out = tokens * depth, columns * depth, tokens * columns
    return work(direction, x + weight + out, 2 * x + 2 * weight + (2 if activated else 1) * out)
