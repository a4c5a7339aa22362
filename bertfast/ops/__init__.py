"""The fused ops on packed tensors, each with a backward. See `bertfast.reference` for what they compute."""

from bertfast.ops.attention import masked_attention, varlen_attention
from bertfast.ops.embedding import embed_layer_norm
from bertfast.ops.feed_forward import feed_forward
from bertfast.ops.gelu import bias_gelu
from bertfast.ops.linear import linear
from bertfast.ops.loss import MaskedLMLoss, masked_lm_loss
from bertfast.ops.norm import residual_layer_norm
from bertfast.ops.packed import PackedWeights

__all__ = [
    "MaskedLMLoss",
    "PackedWeights",
    "bias_gelu",
    "embed_layer_norm",
    "feed_forward",
    "linear",
    "masked_attention",
    "masked_lm_loss",
    "residual_layer_norm",
    "varlen_attention",
]
