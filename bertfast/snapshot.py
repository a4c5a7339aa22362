"""What a base model's parts were found to be, kept until a fact that it rests on changes."""

from typing import Any

from torch import nn

from bertfast.calls import STATE, BackboneState, Snapshot
from bertfast.eligibility import EmbeddingReading, LayerReading
from bertfast.guard import HOOKS, Guard
from bertfast.runtime.encoder import NativeEncoder, NativeLayer


def take(state: BackboneState, encoder: nn.Module, config: Any) -> Snapshot | None:
    """The snapshot of an encoder whose layers can all be handed packed tokens, of its embeddings and configuration.

    None where something cannot be watched: hooks, even those that change nothing; parameters that are gathered for each
    call; replicas; a model whose embeddings have not been called yet.
    """
    embeddings, layers = state.structure, encoder.layer
    if embeddings is None or not embeddings.is_current():
        return None
    if any(getattr(m, "_is_replica", False) or _has_hooks(m) for m in (encoder, embeddings.owner, *layers)):
        return None
    guard, readings = Guard(), {}
    settings = {} if config is None else config.__dict__
    for name in (*settings, "is_decoder"):
        guard.entry(settings, name)
    guard.entry(encoder._modules, "layer")
    for i, layer in enumerate(layers):
        structure = layer.__dict__[STATE].structure
        reading = structure.read(structure.places["up"].weight)
        if type(reading) is not LayerReading or hasattr(reading.parameters.up_weight, "_fsdp_flattened"):
            return None
        readings[layer] = reading
        guard.entry(layers._modules, str(i))
        guard.entry(layer.__dict__, STATE)
        guard.entry(layer.__dict__, "_compiled_call_impl")
        structure.watch(guard)
    guard.entry(layers._modules, str(len(layers)))
    reading = embeddings.read()
    if not readings or type(reading) is not EmbeddingReading:
        return None
    embeddings.watch(guard)
    if not guard.holds():
        return None
    native = NativeEncoder([NativeLayer(*r, layer.__dict__[STATE].packs) for layer, r in readings.items()])
    return Snapshot(guard, encoder, config, readings, embeddings.owner, reading, native)


def _has_hooks(module: nn.Module) -> bool:
    return any(module.__dict__[hooks] for hooks in HOOKS)
