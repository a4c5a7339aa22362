"""Where bertfast enters a Hugging Face model: subclasses of its layer, encoder and embeddings, and hooks on the model.

One call of a patched model goes like this. The hook before the base model sees the mask as the user gave it, decides
whether the call can run without padding, and opens a `Frame` for this thread. The embeddings compute the valid tokens
only and leave them in the frame. The encoder takes them from there, hands each layer the packed tokens with a
`Ticket` in place of the mask, and puts the rectangle back at the end. Where the frame says "rectangle" nothing is
packed: stock code prepares its mask, and each layer runs the fused ops on all positions with it. Where a layer cannot
even do that, it runs stock code.

The mask that goes on into stock code in a packed call is small, (batch, 1, [1,] seq_len), and says the same as the
user's, so that a layer which has to run stock code in the middle of a packed call computes the right thing.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast.calls import STATE, Frame, Ticket, calls, count, structure_of
from bertfast.eligibility import (
    EmbeddingStructure,
    LayerReading,
    LayerStructure,
    Refusal,
    refuse_config,
    refuse_keywords,
    traced,
)
from bertfast.families import FAMILIES, Role, is_legacy, role_of
from bertfast.layer import LayerPacks, encoder_layer
from bertfast.ops import embed_layer_norm, varlen_attention
from bertfast.packing import Packing
from bertfast.planning import plan_encoder


class EmbeddingsSeam:
    """Mixed into the embeddings' class: the fused embedding op, for the valid tokens only in a packed call."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        """As in stock code; in a packed call with zeros at padding positions."""
        if not traced():
            frame = calls.frames[-1] if calls.frames else None
            if frame is not None and (frame.model is None or frame.model._modules.get("embeddings") is not self):
                frame = None
            packing = None if frame is None else frame.packing
            if inputs_embeds is not None or past_key_values_length or input_ids is None:
                out: Tensor | Refusal = Refusal("embeddings: given as a tensor")
            else:
                out = _embed(self, packing, input_ids, token_type_ids, position_ids)
            if type(out) is not Refusal:
                return out.view(*input_ids.shape, -1) if packing is None else packing.pad(out)
            if frame is not None:
                frame.reasons.add(out)
        return super().forward(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values_length=past_key_values_length,
        )


def _embed(
    module: nn.Module, packing: Packing | None, input_ids: Tensor, types: Tensor | None, positions: Tensor | None
) -> Tensor | Refusal:
    """The fused embeddings, (tokens, hidden): of the packed tokens, or of the whole rectangle without a packing."""
    structure = structure_of(module, module.__dict__[STATE], EmbeddingStructure)
    reading = structure if type(structure) is Refusal else structure.read()
    if type(reading) is Refusal:
        return Refusal(f"embeddings: {reading}")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        return Refusal("embeddings: input_ids that are not (batch, seq_len) integers")
    batch, seq_len = input_ids.shape
    position_buffer, type_buffer = module._buffers.get("position_ids"), module._buffers.get("token_type_ids")

    def packed(ids: Tensor) -> Tensor:
        ids = ids.expand(batch, seq_len)
        return (ids.reshape(-1) if packing is None else packing.pack(ids)).long()

    for ids in (positions, types):
        if ids is not None and (ids.dim() != 2 or ids.shape[1] != seq_len or ids.shape[0] not in (1, batch)):
            return Refusal("embeddings: position_ids or token_type_ids of another shape")
    if positions is not None:
        positions = packed(positions)
    elif position_buffer is None or seq_len > position_buffer.shape[1]:
        return Refusal("embeddings: more positions than the model has")
    else:
        columns = packed(torch.arange(seq_len, device=input_ids.device)) if packing is None else packing.position_ids()
        positions = position_buffer[0].index_select(0, columns)
    if types is not None:
        types = packed(types)
    elif type_buffer is None or is_legacy(module.__dict__[STATE].family):
        return Refusal("embeddings: no token_type_ids")
    else:
        types = type_buffer[0].index_select(0, positions)
    return embed_layer_norm(
        *(packed(input_ids), positions, types, *reading.tensors, reading.eps),
        padding_idx=reading.padding_idx,
        dropout_p=reading.dropout,
    )


class EncoderSeam:
    """Mixed into the encoder's class: runs the layers on packed tokens where the frame says so."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in stock code. The layers are called as modules, so that their hooks and checkpointing work."""
        if traced():
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        frames = calls.frames
        if frames and frames[-1].encoder is self:
            return _run(self, frames[-1], hidden_states, attention_mask, args, kwargs)
        # Somebody called `forward` of the model, not the model, as sentence-transformers 6 does, or this encoder alone.
        frame = Frame(None, self)
        plan = plan_encoder(self, hidden_states, attention_mask, args, kwargs)
        if type(plan) is Refusal:
            frame.rectangle = plan
        else:
            frame.packing = plan
        frames.append(frame)
        try:
            return _run(self, frame, hidden_states, attention_mask, args, kwargs)
        finally:
            frames.remove(frame)

    def _stock(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def _run(encoder: Any, frame: Frame, hidden_states: Tensor, mask: Tensor | None, args: tuple, kwargs: dict) -> Any:
    if frame.packing is not None:
        output = _run_packed(encoder, frame.packing, hidden_states, mask, kwargs)
    else:
        output = encoder._stock(hidden_states, mask, *args, **kwargs)
    count(encoder.__dict__[STATE], frame)
    return output


def _run_packed(encoder: nn.Module, packing: Packing, hidden_states: Tensor, mask: Tensor | None, kwargs: dict) -> Any:
    # The embeddings gave a true rectangle, which hooks, adapters and stock code in between may look at and change.
    # The two copies cost 0.2 % of a forward pass (0.8 ms of 465 on MiniLM, 64 sentences in 128 columns, one core).
    x = packing.pack(hidden_states)
    ticket = Ticket(packing, mask)
    for layer in encoder.layer:
        out = layer(x, ticket)
        x = out[0] if isinstance(out, tuple) else out
    hidden = packing.pad(x)
    family = encoder.__dict__[STATE].family
    if is_legacy(family) and not kwargs.get("return_dict", True):
        return (hidden,)
    return getattr(sys.modules[family.module], family.encoder_output)(last_hidden_state=hidden)


class LayerSeam:
    """Mixed into the layer's class: the fused layer, on packed tokens or on the rectangle; stock code otherwise."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in stock code; (tokens, hidden) and a `Ticket` in place of hidden states and mask in a packed call."""
        ticket = attention_mask if type(attention_mask) is Ticket else None
        if ticket is None and traced():
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        state = self.__dict__[STATE]
        structure = state.structure
        if ticket is None or structure is None or structure.owner is not self:
            structure = structure_of(self, state, LayerStructure)
        reading: Any = structure
        if type(structure) is not Refusal and ticket is None:  # a packed call has asked all layers before it began
            reading = structure.refusal() or refuse_config(structure.config)
        if type(reading) is not Refusal:
            reading = structure.read(hidden_states)
        if type(reading) is not Refusal:
            attend = (
                _packed_attention(ticket.packing, reading)
                if ticket is not None
                else refuse_keywords(kwargs)
                or (Refusal("cross attention or head mask") if any(a is not None for a in args) else None)
                or _rectangle_attention(hidden_states, attention_mask, reading, structure.adds_mask)
            )
            reading = attend if type(attend) is Refusal else reading
        frames = calls.frames
        if type(reading) is Refusal:
            if frames:
                frames[-1].reasons.add(f"layer: {reading}")
            if ticket is None:
                return super().forward(hidden_states, attention_mask, *args, **kwargs)
            out = super().forward(ticket.packing.pad(hidden_states), ticket.mask, *args, **kwargs)
            if isinstance(out, tuple):
                return (ticket.packing.pack(out[0]), *out[1:])
            return ticket.packing.pack(out)
        if frames:
            frames[-1].fused = True
        x = hidden_states if ticket is not None else hidden_states.reshape(-1, hidden_states.shape[-1])
        keep = state.structure is structure and _keeps_weights(self, reading)
        out = encoder_layer(x, attend, reading.parameters, reading.settings, state.packs if keep else LayerPacks())
        out = out if ticket is not None else out.view(hidden_states.shape)
        return (out, None) if is_legacy(state.family) else out


def _keeps_weights(layer: nn.Module, reading: LayerReading) -> bool:
    """Whether the weights of this call can be recognised in the next one, so that packing them is worth while.

    Under autocast they are cast anew in every call. FSDP gathers them into the same memory behind autograd's back.
    """
    weight = reading.parameters.up_weight
    cast = torch.is_autocast_enabled(weight.device.type)
    return not cast and is_seam(layer) and not hasattr(weight, "_fsdp_flattened")


def _packed_attention(packing: Packing, reading: LayerReading) -> Callable[[Tensor], Tensor]:
    return functools.partial(
        varlen_attention,
        cu_seqlens=packing.cu_seqlens,
        max_seqlen=packing.max_seqlen,
        order=packing.order,
        scale=reading.scale,
        dropout_p=reading.settings.attention_dropout,
    )


def _rectangle_attention(
    hidden_states: Tensor, mask: Tensor | None, reading: LayerReading, eager: bool
) -> Callable[[Tensor], Tensor] | Refusal:
    """Attention over all positions with the mask that stock code made, a boolean one or one to be added."""
    if hidden_states.dim() != 3:
        return Refusal(f"hidden states of {hidden_states.dim()} dimensions")
    batch, seq_len, _ = hidden_states.shape
    if mask is None:
        return _packed_attention(Packing.full(batch, seq_len, hidden_states.device), reading)
    heads = reading.settings.heads
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return Refusal("an attention mask of unknown form")
    if any(n not in (1, whole) for n, whole in zip(mask.shape, (batch, heads, seq_len, seq_len), strict=True)):
        return Refusal(f"an attention mask of shape {tuple(mask.shape)}")
    if mask.dtype != hidden_states.dtype and (eager or mask.dtype != torch.bool):
        return Refusal(f"an attention mask of {mask.dtype}")

    p = reading.settings.attention_dropout

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(batch, seq_len, 3, heads, -1).permute(2, 0, 3, 1, 4)
        added = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        if eager:  # the two do not agree on rows without any valid key
            scores = q @ k.transpose(2, 3) * reading.scale + added
            context = F.dropout(torch.softmax(scores, dim=-1), p) @ v
        else:
            context = F.scaled_dot_product_attention(q, k, v, added, dropout_p=p, scale=reading.scale)
        return context.transpose(1, 2).flatten(0, 1)

    return attend


_MIXINS: dict[Role, type] = {"embeddings": EmbeddingsSeam, "encoder": EncoderSeam, "layer": LayerSeam}


@functools.cache
def seam_class(stock: type) -> type:
    """The subclass that replaces `stock` on an instance.

    It has the same name, since sharding policies go by that, and is importable from this module, since pickle does.
    """
    _, role = role_of(stock)
    body = {"__module__": __name__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (_MIXINS[role], stock), body)


def is_seam(module: nn.Module) -> bool:
    """Whether the module's class is one of `seam_class`, exactly."""
    return type(module).__module__ == __name__


def __getattr__(name: str) -> type:
    """The seam classes by name, for pickle."""
    for family in FAMILIES:
        if name in (family.embeddings, family.encoder, family.layer):
            return seam_class(getattr(importlib.import_module(family.module), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
