"""The GEMMs of the layers of a patched or native model, and what each of them multiplies."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from bertfast.calls import STATE, BackboneState, calls
from bertfast.errors import UnsupportedModelError
from bertfast.gate import closed
from bertfast.layer import LayerPacks
from bertfast.model import BertEncoder, BertLayer
from bertfast.ops import PackedWeights
from bertfast.patching import backbones, layers_of, root_of


class Place(NamedTuple):
    """One GEMM. gemm: a field of `LayerPacks`."""

    layer: str
    gemm: str

    def __str__(self) -> str:
        return f"{self.layer} {self.gemm}"


class Places:
    """The GEMMs of all layers inside a native model or a patched one.

    Raises UnsupportedModelError where there are none.
    """

    def __init__(self, model: Any) -> None:
        self._root = root_of(model)
        found = [(name, module) for name, module, _ in backbones(self._root)]
        self._states: list[BackboneState] = [module.__dict__[STATE] for _, module in found]
        # Each layer's holder of `packs`, and what its GEMMs multiply unquantised.
        self._layers: dict[str, tuple[Any, str | None]] = {}
        for prefix, module in found:
            for name, layer in layers_of(module):
                state = module.__dict__[STATE]
                self._layers[f"{prefix}.{name}".lstrip(".")] = layer.__dict__[STATE], state.operand
        for prefix, encoder in self._root.named_modules():
            if isinstance(encoder, BertEncoder):
                for name, layer in encoder.named_modules():
                    if isinstance(layer, BertLayer):
                        self._layers[f"{prefix}.{name}".lstrip(".")] = layer, encoder.operand
        if not self._layers:
            raise UnsupportedModelError(f"there are no layers in this {type(model).__name__}")

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names as `named_modules` has them."""
        return tuple(self._layers)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The layers themselves."""
        named = dict(self._root.named_modules())
        return tuple(named[name] for name in self._layers)

    @property
    def all(self) -> tuple[Place, ...]:
        """In the order in which they are computed."""
        return tuple(Place(layer, gemm) for layer in self._layers for gemm in LayerPacks._fields)

    @property
    def packed(self) -> bool:
        """Whether every layer keeps packed weights."""
        return all(holder.packs.qkv is not None for holder, _ in self._layers.values())

    @property
    def nbytes(self) -> int:
        """Of the packed weights."""
        return sum(holder.packs.nbytes for holder, _ in self._layers.values())

    def unused(self) -> tuple[Place, ...]:
        """Those that hold no packed weights: no inference call has come by."""
        return tuple(place for place in self.all if getattr(self._packs(place), place.gemm).nbytes == 0)

    def _packs(self, place: Place) -> LayerPacks:
        return self._layers[place.layer][0].packs

    def take(self) -> list[LayerPacks]:
        """What the layers have now, for `put`."""
        return [holder.packs for holder, _ in self._layers.values()]

    def put(self, packs: Sequence[LayerPacks]) -> None:
        """Give each layer its packed weights, while no patched model is called."""
        with closed(calls.frames, calls.heads):
            for (holder, _), layer_packs in zip(self._layers.values(), packs, strict=True):
                holder.packs = layer_packs
            for state in self._states:
                state.snapshot = None

    def set(self, operands: Mapping[Place, str]) -> None:
        """Have these GEMMs multiply so, and all others what they do unquantised. What stays keeps its weights."""
        new = []
        for layer, (holder, plain) in self._layers.items():
            packs = {}
            for gemm, place in holder.packs._asdict().items():
                operand = operands.get(Place(layer, gemm), plain)
                packs[gemm] = place if place is None or place.operand == operand else PackedWeights(operand)
            new.append(LayerPacks(**packs))
        self.put(new)
