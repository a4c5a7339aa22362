"""linear: activation(x W^T + b), the GEMM: our own with packed weights on a CPU, cuBLAS's or Triton's on a GPU.

Triton's writes the activated output at once, which saves writing, reading and writing it again. Whether that is worth
more than what cuBLAS's GEMM is faster by depends on the card and the shape, so it is chosen only where `TRITON_FROM`
says so, from a measurement: see benchmarks/gpu.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import backend
from bertfast.layout import adjacent
from bertfast.ops import gemm, registry
from bertfast.ops.gelu import bias_gelu, cpu_gelu_
from bertfast.ops.packed import PackedWeights, check

# The activations, and the form of GELU that each is.
ACTIVATIONS = {"none": "", "gelu": "none", "gelu_tanh": "tanh"}
# From how many rows on Triton's GEMM with its activation beats cuBLAS's GEMM and bias_gelu, by (major compute
# capability, activation, out_features, in_features), in half precision. `python -m benchmarks.gpu` prints the lines
# that its measurements give; a card with any also needs ("triton", "cuda", "reference") for linear in
# `backend.PREFERENCES`. No entry: never by itself.
TRITON_FROM: dict[tuple[int, str, int, int], int] = {}


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    activation: str = "none",
    packed: PackedWeights | None = None,
) -> Tensor:
    """activation(x W^T + b); several weights are one GEMM that lays their outputs side by side.

    Args:
        x: (tokens, in_features).
        weight: (out_features, in_features) of x's dtype, or a sequence of such (query, key and value, say).
        bias: (out_features,), a sequence of as many as there are weights, or None.
        activation: "none", "gelu" (erf) or "gelu_tanh"; fused into the GEMM on packed weights.
        packed: where to keep a packed copy of the weights between inference calls on the CPU; None keeps none.

    Returns (tokens, sum of out_features) in x's dtype; under autocast everything is converted to its dtype first, as
    torch.nn.functional.linear does. Raises ValueError / TypeError where shapes, dtypes or devices do not fit.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    biases = () if bias is None else (bias,) if isinstance(bias, Tensor) else tuple(bias)
    registry.check_tensor("x", x)
    if strange := [type(t).__name__ for t in (*weights, *biases) if not isinstance(t, Tensor)]:
        raise TypeError(f"weight and bias must be tensors, not {', '.join(strange)}")
    if packed is not None and not isinstance(packed, PackedWeights):
        raise TypeError(f"packed must be a PackedWeights, not a {type(packed).__name__}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights, biases = x.to(dtype), tuple(w.to(dtype) for w in weights), tuple(b.to(dtype) for b in biases)
        packed = None  # a copy of what was converted for this call alone would never be found again
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if registry.seen(x, *weights, *biases):
        check(x, weights, biases)
        if packed is not None and not torch.compiler.is_compiling():
            packed.clear()
        if activation == "none":
            return _op(x, list(weights), list(biases), "none")
        # Kept apart here because the activation's backward wants what goes into it.
        bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
        return bias_gelu(_op(x, list(weights), [], "none"), bias, approximate=ACTIVATIONS[activation])
    run = backend.implementation("linear", x, _shape(x, weights, activation))
    if run is not _cpu:  # which checks what its copy was not made of
        check(x, weights, biases)
    return run(x, weights, biases, activation, packed)


def _cpu(x, weights, biases, activation, packed):
    held = packed.get(x, weights, biases) if packed is not None and x.numel() else None
    if held is not None:
        return held.linear(x, activation)
    check(x, weights, biases)
    out = gemm.product(x, gemm.joined(weights), gemm.joined(biases))
    return out if activation == "none" else cpu_gelu_(out, ACTIVATIONS[activation])


def _separate(x, weights, biases):
    """One GEMM a weight, each into its own columns of the output."""
    if len(weights) == 1:
        return F.linear(x, weights[0], biases[0] if biases else None)
    out = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))
    columns = out.split([w.shape[0] for w in weights], dim=1)
    for i, (weight, y) in enumerate(zip(weights, columns, strict=True)):
        if biases:
            torch.addmm(biases[i], x, weight.t(), out=y)
        else:
            torch.mm(x, weight.t(), out=y)
    return out


def _library(x, weights, biases, activation, packed):
    """The GEMM of PyTorch's library (cuBLAS on a GPU), then the activation in the implementation that is chosen."""
    weight = adjacent(weights)
    out = _separate(x, weights, biases) if weight is None else F.linear(x, weight, gemm.joined(biases))
    if activation == "none":
        return out
    forward, _ = backend.implementation("bias_gelu", out)
    return forward(out, None, ACTIVATIONS[activation])


def _shape(x: Tensor, weights: Sequence[Tensor], activation: str) -> tuple[int, str, int, int, int] | None:
    """The class of shapes that a GPU's choice depends on: (major, activation, out, in, rows up to a power of two)."""
    if x.device.type != "cuda" or x.dim() != 2:
        return None
    rows = 1 << max(x.shape[0] - 1, 0).bit_length()
    return _major(x.device), activation, sum(w.shape[0] for w in weights), x.shape[1], rows


@functools.cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _refuse_triton(dtype: torch.dtype, shape: tuple[int, str, int, int, int]) -> str | None:
    """Why Triton's GEMM is not chosen for this class of shapes; whoever asks for it by name gets it."""
    if backend.current() == "triton":
        return None
    *key, rows = shape
    least = TRITON_FROM.get(tuple(key))
    if dtype == torch.float32 or least is None:
        return "was not measured to beat cuBLAS at these shapes on this kind of GPU"
    return None if rows >= least else f"beats cuBLAS from {least} rows on at these shapes"


backend.register("linear", "cuda", _library)
backend.register("linear", "triton", backend.Later("bertfast.kernels.linear", "linear_fwd"), _refuse_triton)
backend.register("linear", "cpu", _cpu)
backend.register("linear", "reference", _library)


def _run(x, weights, biases, activation):
    run = backend.implementation("linear", x, _shape(x, weights, activation))
    return run(x, weights, biases, activation, None)


def _fake(x, weights, biases, activation):
    return x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))


def _run_backward(dout, x, weights, biases):
    dx = gemm.gradient_of_input(dout, gemm.joined(weights))
    return dx, gemm.gradient_of_weight(dout, x), dout.sum(0) if biases else x.new_empty(0)


def _fake_backward(dout, x, weights, biases):
    columns = sum(w.shape[0] for w in weights)
    return x.new_empty(x.shape), x.new_empty(columns, x.shape[1]), x.new_empty(columns if biases else 0)


def _setup_context(ctx, inputs, output):
    x, weights, biases, ctx.activation = inputs
    ctx.biases = bool(biases)
    ctx.save_for_backward(x, *weights)


def _autograd(ctx, dout):
    if ctx.activation != "none":
        raise RuntimeError("bertfast::linear has a backward without an activation only: apply bias_gelu to its output")
    x, *weights = ctx.saved_tensors
    dx, dweight, dbias = _op_backward(dout, x, weights, ctx.biases)
    rows = [w.shape[0] for w in weights]
    return dx, list(dweight.split(rows)), list(dbias.split(rows)) if ctx.biases else [], None


_op_backward = registry.define(
    "linear_backward(Tensor dout, Tensor x, Tensor[] weights, bool biases) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_op = registry.define(
    "linear(Tensor x, Tensor[] weights, Tensor[] biases, str activation) -> Tensor",
    _run,
    _fake,
    _setup_context,
    _autograd,
)
