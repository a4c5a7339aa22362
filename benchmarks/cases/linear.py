"""linear against PyTorch's GEMM: the up- and down-projections, and query, key and value.

With packed weights also against oneDNN's GEMM on weights that it has packed, and in int8.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import FORWARD, Case, Peer, element_size, normal, work
from bertfast import backend, ops, reference
from bertfast.errors import BackendError
from bertfast.ops import PackedWeights

# As oneDNN's GEMM has an activation: its name, no scalars, and which form of it.
_POST_OPS = {"none": ("none", [], ""), "gelu": ("gelu", [], "none")}


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
        return _activated(F.linear(x, weight, bias), activation)

    def reordered(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights | None) -> tuple:
        return x, _reorder(weight, tokens), bias, None

    def onednn(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_POST_OPS[activation])

    packs = packed and torch.backends.mkldnn.is_available()
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
        peers={"eager": Peer(eager)} | ({"oneDNN packed": Peer(onednn, reordered)} if packs else {}),
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

    def reordered(x: Tensor, *t: Tensor) -> tuple:
        return x, _reorder(torch.cat(t[:3]), tokens), torch.cat(t[3:6])

    def onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_POST_OPS["none"])

    peers = {"three GEMMs": Peer(apart), "a copy of the weights": Peer(copied)}
    if packed and torch.backends.mkldnn.is_available():
        peers["oneDNN packed"] = Peer(onednn, reordered)
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


def quantised(tokens: int, columns: int, depth: int, activation: str) -> Case:
    """activation(x W^T + b) in int8 on a CPU, forward: float32 in and out, packed weights, rounded as `reference` says.

    oneDNN's is of activations that are in eight bits already, with one scale for all of them; ours finds a scale for
    each row and rounds within what is timed.
    """

    def make(g: torch.Generator) -> tuple:
        weight = normal(g, columns, depth, dtype="float32", scale=depth**-0.5)
        x, bias = normal(g, tokens, depth, dtype="float32"), normal(g, columns, dtype="float32")
        return x, weight, bias, PackedWeights("int8")

    def ours(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights) -> Tensor:
        if backend.current() not in ("auto", "cpu"):
            raise BackendError("only the CPU kernels multiply int8")
        return ops.linear(x, weight, bias, activation=activation, packed=kept)

    def gold(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights) -> Tensor:
        return _activated(reference.quantised_linear(x, weight, bias), activation)

    def rounded(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights) -> Tensor:
        u, scale, zero = reference.quantise_rows(x)
        q, weight_scale = reference.quantise_weight(weight)
        x, weight = (u.float() - zero[:, None]) * scale[:, None], q.float() * weight_scale[:, None]
        return _activated(F.linear(x, weight, bias), activation)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights) -> Tensor:
        return _activated(F.linear(x, weight, bias), activation)

    def in_eight_bits(x: Tensor, weight: Tensor, bias: Tensor, kept: PackedWeights) -> tuple:
        u, scale, zero = reference.quantise_rows(x.reshape(1, -1))
        q, weight_scale = reference.quantise_weight(weight)
        packed = torch.ops.onednn.qlinear_prepack(q, [tokens, depth])
        zeros = torch.zeros(columns, dtype=torch.int64)
        return u.view_as(x), scale.item(), zero.item(), packed, weight_scale, zeros, bias

    def onednn(*inputs: Any) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(*inputs, 1.0, 0, torch.float32, *_POST_OPS[activation])

    packs = torch.backends.mkldnn.is_available()
    return Case(
        op=f"linear {activation} packed int8",
        shape=f"{tokens}x{columns}x{depth}",
        dtype="float32",
        direction=FORWARD,
        device="cpu",
        make=make,
        ours=ours,
        gold=gold,
        plain=rounded,
        peers={"float32": Peer(eager)} | ({"oneDNN u8 s8": Peer(onednn, in_eight_bits)} if packs else {}),
        flops=_flops(FORWARD, tokens, columns, depth),
        nbytes=4 * tokens * depth + columns * depth + 4 * tokens * columns,
    )


def _activated(y: Tensor, activation: str) -> Tensor:
    return y if activation == "none" else F.gelu(y)


def _reorder(weight: Tensor, rows: int) -> Tensor:
    """The weight as oneDNN wants it for so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _flops(direction: str, tokens: int, columns: int, depth: int) -> float:
    """One GEMM forward, two backward."""
    return work(direction, 2.0, 4.0) * tokens * columns * depth


def _elements(direction: str, tokens: int, columns: int, depth: int, activated: bool) -> float:
    """Forward: read x and W, write the output; backward: read dout, x, W and what was activated, write dx and dW."""
    x, weight, out = tokens * depth, columns * depth, tokens * columns
    return work(direction, x + weight + out, 2 * x + 2 * weight + (2 if activated else 1) * out)
