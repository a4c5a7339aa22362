"""feed_forward: activation(x W1^T + b1) W2^T, the feed-forward block of a layer up to its second bias.

In training the activation's output, a quarter of all that a layer would keep for its backward, is made anew there from
the first GEMM's output, which the activation's own backward needs anyway.
"""

import torch
from torch import Tensor

from bertfast.ops import gemm, registry
from bertfast.ops.gelu import bias_gelu, gelu_again
from bertfast.ops.linear import ACTIVATIONS, linear
from bertfast.ops.packed import PackedWeights


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    *,
    activation: str = "gelu",
    up_packed: PackedWeights | None = None,
    down_packed: PackedWeights | None = None,
) -> Tensor:
    """activation(x W1^T + b1) W2^T.

    Args:
        x: (tokens, hidden).
        up_weight, up_bias: (features, hidden) and (features,) of x's dtype.
        down_weight: (out_features, features).
        activation: "gelu" (erf) or "gelu_tanh".
        up_packed, down_packed: as `packed` of `linear`, one for each weight.

    Returns (tokens, out_features); under autocast in its dtype. Raises as `linear` does. Source: Vaswani et al. 2017,
    section 3.3, with the activation of Devlin et al. 2019.
    """
    registry.check_axes("x", x, "tokens", "hidden")
    registry.check_axes("up_weight", up_weight, "features", "hidden")
    registry.check_axes("up_bias", up_bias, "features")
    registry.check_axes("down_weight", down_weight, "out_features", "features")
    for name, packed in (("up_packed", up_packed), ("down_packed", down_packed)):
        if packed is not None and not isinstance(packed, PackedWeights):
            raise TypeError(f"{name} must be a PackedWeights, not a {type(packed).__name__}")
    if activation not in ACTIVATIONS or activation == "none":
        raise ValueError(f'activation must be "gelu" or "gelu_tanh", not {activation!r}')
    if not registry.seen(x, up_weight, up_bias, down_weight):
        up = linear(x, up_weight, up_bias, activation=activation, packed=up_packed)
        return linear(up, down_weight, packed=down_packed)
    up = linear(x, up_weight, packed=up_packed)
    if down_packed is not None and not torch.compiler.is_compiling():
        down_packed.clear()  # as `linear` does in training
    bias, weight = up_bias.to(up.dtype), down_weight.to(up.dtype)
    registry.check_like(up, up_bias=(bias, up.shape[1:]), down_weight=(weight, (weight.shape[0], up.shape[1])))
    return _op(up, bias, weight, ACTIVATIONS[activation])


def _run(x, bias, weight, approximate):
    return linear(bias_gelu(x, bias, approximate=approximate), weight)


def _fake(x, bias, weight, approximate):
    return x.new_empty(x.shape[0], weight.shape[0])


def _run_backward(dout, x, bias, weight, approximate):
    activated, dx, dbias = gelu_again(gemm.gradient_of_input(dout, weight), x, bias, approximate)
    return dx, dbias, gemm.gradient_of_weight(dout, activated)


def _fake_backward(dout, x, bias, weight, approximate):
    return x.new_empty(x.shape), bias.new_empty(bias.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    x, bias, weight, ctx.approximate = inputs
    ctx.save_for_backward(x, bias, weight)


def _autograd(ctx, dout):
    return *_op_backward(dout, *ctx.saved_tensors, ctx.approximate), None


_op_backward = registry.define(
    "gelu_linear_backward(Tensor dout, Tensor x, Tensor bias, Tensor weight, str approximate)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_op = registry.define(
    "gelu_linear(Tensor x, Tensor bias, Tensor weight, str approximate) -> Tensor",
    _run,
    _fake,
    _setup_context,
    _autograd,
)
