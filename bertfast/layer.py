"""One transformer layer on packed tokens: the computation behind the native model and every patched one."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from bertfast.ops import PackedWeights, feed_forward, linear, residual_layer_norm

# Hugging Face's names of activations, and what `linear` calls them.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class LayerParameters(NamedTuple):
    """The sixteen tensors of a layer; weights are (out_features, in_features)."""

    qkv_weights: tuple[Tensor, Tensor, Tensor]
    qkv_biases: tuple[Tensor, Tensor, Tensor]
    attention_weight: Tensor
    attention_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    output_norm_weight: Tensor
    output_norm_bias: Tensor


class LayerSettings(NamedTuple):
    """What a layer is told besides its parameters. The dropout probabilities are 0 outside training."""

    heads: int
    eps: float
    activation: str = "gelu"
    attention_dropout: float = 0.0
    attention_output_dropout: float = 0.0
    output_dropout: float = 0.0


class LayerPacks(NamedTuple):
    """Where the packed copies of a layer's four GEMM weights are kept; without places, nothing is packed."""

    qkv: PackedWeights | None = None
    attention: PackedWeights | None = None
    up: PackedWeights | None = None
    down: PackedWeights | None = None

    @classmethod
    def empty(cls, operand: str | None = None) -> "LayerPacks":
        """Four places with nothing packed yet. operand: what the GEMMs multiply, as of `PackedWeights`."""
        return cls(*(PackedWeights(operand) for _ in range(4)))

    @property
    def operands(self) -> set[str | None]:
        """What the GEMMs multiply, as of `PackedWeights`; nothing where there are no places."""
        return {place.operand for place in self if place is not None}

    def clear(self) -> None:
        """Forget the copies; the next inference call makes new ones."""
        for place in self:
            if place is not None:
                place.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that the copies hold."""
        return sum(place.nbytes for place in self if place is not None)


def encoder_layer(
    x: Tensor,
    attend: Callable[[Tensor], Tensor],
    parameters: LayerParameters,
    settings: LayerSettings,
    packs: LayerPacks = LayerPacks(),  # noqa: B008 (immutable)
) -> Tensor:
    """The post-LN encoder layer of BERT: y = LN(x + Attention(x) W + b); LN(y + GELU(y W1 + b1) W2 + b2).

    Args:
        x: (tokens, hidden), all sequences behind one another.
        attend: (tokens, 3, heads, head_size) to (tokens, heads, head_size), the attention over the QKV GEMM's output.
        packs: where packed weights are kept between inference calls.

    Returns (tokens, hidden) in x's dtype. Source: Vaswani et al. 2017, Devlin et al. 2019.
    """
    p, s = parameters, settings
    # Nested so that nothing outlives its use: the widest tensors of one step would still be there at the next.
    shape = x.shape[0], 3, s.heads, x.shape[1] // s.heads
    context = attend(linear(x, p.qkv_weights, p.qkv_biases, packed=packs.qkv).view(shape)).flatten(1)
    attended = linear(context, p.attention_weight, packed=packs.attention)
    del context
    norm = p.attention_norm_weight, p.attention_norm_bias, s.eps
    y = _add_norm(attended, x, p.attention_bias, *norm, s.attention_output_dropout)
    del attended
    up = y, p.up_weight, p.up_bias
    fed = feed_forward(*up, p.down_weight, activation=s.activation, up_packed=packs.up, down_packed=packs.down)
    return _add_norm(fed, y, p.down_bias, p.output_norm_weight, p.output_norm_bias, s.eps, s.output_dropout)


def _add_norm(
    x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
) -> Tensor:
    if x.dtype is not residual.dtype:
        # Under autocast the GEMMs are in half precision and the residual stream is not, as in stock code.
        x = x.to(residual.dtype)
    return residual_layer_norm(x, residual, weight, bias, eps, x_bias=x_bias, dropout_p=dropout)


def activation_name(hidden_act: object) -> str | None:
    """What `linear` calls a Hugging Face activation; None where it has no such one."""
    return ACTIVATIONS.get(hidden_act) if isinstance(hidden_act, str) else None
