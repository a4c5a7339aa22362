"""All layers of an encoder in one native call (csrc/cpu/encoder.cpp): inference on a CPU, with no Python in between.

The residual stream and the statistics are float32, whatever the GEMMs multiply.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertfast import backend, machine, native
from bertfast.layer import LayerPacks, LayerParameters, LayerSettings
from bertfast.ops import cpu, registry
from bertfast.ops.packed import ACTIVATIONS, Packed, sample_of
from bertfast.packing import Packing

_PLAIN = (Tensor, torch.nn.Parameter)


class NativeLayer(NamedTuple):
    """What a layer computes with. scale is that of the attention scores."""

    parameters: LayerParameters
    settings: LayerSettings
    scale: float
    packs: LayerPacks


class _Built(NamedTuple):
    """The native encoder; what it points to; and how the parameters that it was made of were then."""

    encoder: Any
    keep: list
    addresses: list[int]
    versions: list[int]
    sample: Any

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the parameters have the values that they had."""
        return (
            [t.data_ptr() for t in tensors] == self.addresses
            and [t._version for t in tensors] == self.versions
            and self.sample.matches()
        )


class NativeEncoder:
    """The layers, as they are now: whoever keeps this knows when a layer's tensors or settings are exchanged.

    Values that change in place are noticed as `PackedWeights` notices them. The packed weights are those of the layers'
    `packs`, which the op-by-op path uses too. Threads may call it at once.
    """

    def __init__(self, layers: Sequence[NativeLayer]) -> None:
        self._layers = list(layers)
        self._tensors = [t for layer in layers for t in _tensors(layer.parameters)]
        self.refusal = self._refuse()
        self._built: _Built | None = None

    def _refuse(self) -> str | None:
        """Why these layers run op by op, whatever the input."""
        if native.cpu is None:
            return native.cpu_reason
        if not self._layers:
            return "no layers"
        weight, first = self._layers[0].parameters.up_weight, self._layers[0].settings
        hidden, heads = weight.shape[1], first.heads
        if weight.device.type != "cpu":
            return f"the weights are on {weight.device}"
        if weight.dtype not in cpu.DTYPES:
            return f"{str(weight.dtype).removeprefix('torch.')} weights"
        if hidden % heads:
            return f"{heads} heads do not divide a hidden size of {hidden}"
        if any(type(t) not in _PLAIN or t.dtype is not weight.dtype for t in self._tensors):
            return "weights of several kinds"
        own = str(weight.dtype).removeprefix("torch.")
        for layer in self._layers:
            p, s = layer.parameters, layer.settings
            if layer.packs.qkv is None:
                return "weights are not packed (pack_weights=False)"
            if machine.has_amx() and any((place.operand or own) == "bfloat16" for place in layer.packs):
                return "bfloat16 is left to oneDNN on processors with AMX"
            if s.attention_dropout or s.attention_output_dropout or s.output_dropout:
                return "dropout"
            if (s.heads, s.eps, s.activation) != (first.heads, first.eps, first.activation) or (
                s.activation not in ACTIVATIONS
            ):
                return "layers with different settings"
            shapes = [w.shape for w in (*p.qkv_weights, p.attention_weight, p.up_weight, p.down_weight)]
            inner = weight.shape[0]
            if shapes != [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner)]:
                return "layers of different shapes"
        return None

    @property
    def workspace_bytes(self) -> int:
        """What is kept for further calls, besides the packed weights."""
        return 0 if self._built is None else self._built.encoder.workspace_bytes()

    def run(self, x: Tensor, packing: Packing) -> Tensor | None:
        """(tokens, hidden) to the last layer's output; None where this call has to go op by op."""
        if self.refusal is not None or not self._takes(x):
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in self._tensors)):
            self.clear()  # as `linear` does: training does not pay for packed weights
            return None
        built = self._built
        if built is None or not built.is_of(self._tensors):
            built = self._built = self._build(x)
            if built is None:
                return None
        x = x.contiguous()
        out, cu_seqlens = torch.empty_like(x), packing.cu_seqlens.contiguous()
        addresses = registry.addresses(x, out, cu_seqlens)
        sizes = x.shape[0], cu_seqlens.shape[0] - 1
        built.encoder.run(cpu.DTYPES[x.dtype], *addresses, *sizes, torch.get_num_threads())
        return out

    def _takes(self, x: Tensor) -> bool:
        """Whether nothing else has to see what is computed, and x is of the weights' kind."""
        weight = self._tensors[0]
        if x.shape[-1:] != weight.shape[1:]:
            return False
        if type(x) is not Tensor or x.dtype is not weight.dtype or x.device.type != "cpu" or x.dim() != 2:
            return False
        if backend.current() not in ("auto", "cpu") or torch.is_autocast_enabled("cpu"):
            return False
        return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())

    def clear(self) -> None:
        """Let go of the packed weights; the next inference call takes those of the `packs`, or makes new ones."""
        self._built = None

    def _build(self, x: Tensor) -> _Built | None:
        settings = self._layers[0].settings
        native_layers, keep = [], []
        for layer in self._layers:
            p, packs = layer.parameters, layer.packs
            inner = x.new_empty(0, p.up_weight.shape[0])
            packed = [
                packs.qkv.get(x, p.qkv_weights, p.qkv_biases),
                packs.attention.get(x, (p.attention_weight,), (p.attention_bias,)),
                packs.up.get(x, (p.up_weight,), (p.up_bias,)),
                packs.down.get(inner, (p.down_weight,), (p.down_bias,)),
            ]
            if any(type(copy) is not Packed for copy in packed):
                return None
            norms = [
                t.detach().float().contiguous()
                for t in (p.attention_norm_weight, p.attention_norm_bias, p.output_norm_weight, p.output_norm_bias)
            ]
            keep += [*packed, *norms]
            native_layers.append(([c.addresses for c in packed], registry.addresses(*norms), layer.scale))
        up = self._layers[0].parameters.up_weight
        sizes = up.shape[1], up.shape[0], settings.heads
        encoder = native.cpu.Encoder(*sizes, settings.eps, ACTIVATIONS[settings.activation][0], native_layers)
        addresses, versions = [t.data_ptr() for t in self._tensors], [t._version for t in self._tensors]
        return _Built(encoder, keep, addresses, versions, sample_of(self._tensors))


def _tensors(p: LayerParameters) -> list[Tensor]:
    return [*p.qkv_weights, *p.qkv_biases, *p[2:]]
