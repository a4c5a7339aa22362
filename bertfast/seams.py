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

from bertfast import flattened
from bertfast.architectures import Role, bind, families, is_legacy, parameters_of, returns_tuples, role_of, stock_class
from bertfast.calls import STATE, BackboneState, Frame, LayerState, Ticket, calls, count, structure_of
from bertfast.eligibility import (
    EmbeddingReading,
    EmbeddingStructure,
    LayerReading,
    LayerStructure,
    Refusal,
    refuse_config,
    refuse_keywords,
    traced,
)
from bertfast.layer import LayerPacks, encoder_layer
from bertfast.ops import embed_layer_norm, varlen_attention
from bertfast.packing import Packing
from bertfast.planning import config_of, plan_encoder, refuse_borders
from bertfast.positions import position_ids
from bertfast.relative import biased_attention


class EmbeddingsSeam:
    """Mixed into the embeddings' class: the fused embedding op, for the valid tokens only in a packed call."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in stock code; in a packed call with zeros at padding positions."""
        state = self.__dict__.get(STATE)
        if state is not None and not traced():
            frame = calls.frames[-1] if calls.frames else None
            if frame is not None and (frame.model is None or frame.model._modules.get("embeddings") is not self):
                frame = None
            packing = None if frame is None else frame.packing
            arguments = bind(stock_class(type(self)), args, kwargs)
            out = _embed(self, state, frame, arguments)
            if type(out) is not Refusal:
                return out.view(*arguments["input_ids"].shape, out.shape[1]) if packing is None else packing.pad(out)
            if frame is not None:
                frame.reasons.add(out)
                if packing is not None and packing.is_flat and arguments.get("position_ids") is None:
                    raise ValueError(f"sequences in one row have no positions in stock code, which has to run: {out}")
        return stock_class(type(self)).forward(self, *args, **kwargs)


_EMBEDDED = ("input_ids", "token_type_ids", "position_ids")


def _embed(module: nn.Module, state: BackboneState, frame: Frame | None, arguments: dict[str, Any]) -> Tensor | Refusal:
    """The fused embeddings, (tokens, hidden): of a packed call's tokens, or of the whole rectangle."""
    ids, types, positions = (arguments.get(name) for name in _EMBEDDED)
    if not isinstance(ids, Tensor) or any(
        isinstance(v, Tensor) or v for name, v in arguments.items() if name not in _EMBEDDED
    ):
        return Refusal("embeddings: given as a tensor")
    if frame is not None and frame.snapshot is not None and frame.snapshot.embeddings is module:
        reading: EmbeddingReading | Refusal = frame.snapshot.embedding_reading
    else:
        structure = structure_of(module, state, EmbeddingStructure)
        reading = structure if type(structure) is Refusal else structure.read()
    if type(reading) is Refusal:
        return Refusal(f"embeddings: {reading}")
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        return Refusal("embeddings: input_ids that are not (batch, seq_len) integers")
    batch, seq_len = ids.shape
    packing = (frame and frame.packing) or Packing.full(batch, seq_len, ids.device)
    for given in (positions, types):
        if given is not None and not (
            isinstance(given, Tensor)
            and given.dtype in (torch.int64, torch.int32)
            and given.dim() == 2
            and given.shape[1] == seq_len
            and given.shape[0] in (1, batch)
        ):
            return Refusal("embeddings: position_ids or token_type_ids that are not (batch, seq_len) integers")

    def packed(given: Tensor) -> Tensor:
        return packing.pack(given.expand(batch, seq_len)).long()

    if positions is None:
        positions = position_ids(module, state.family, packing, ids)
        if positions is None:
            return Refusal("embeddings: more positions than the model has")
    else:
        positions = packed(positions)
    word, position, token_type, *norm = reading.tensors
    if token_type is None:  # nothing is added for a type: one row of zeros
        types, token_type = None, word.new_zeros(1, word.shape[1])
    elif types is not None:
        types = packed(types)
    else:
        buffer = module._buffers.get("token_type_ids")
        if buffer is None or is_legacy(state.family):
            return Refusal("embeddings: no token_type_ids")
        types = buffer[0].index_select(0, positions)
    return embed_layer_norm(
        *(packed(ids), positions, types, word, position, token_type, *norm, reading.eps),
        padding_idx=reading.padding_idx,
        position_padding_idx=reading.position_padding_idx,
        dropout_p=reading.dropout,
    )


class EncoderSeam:
    """Mixed into the encoder's class: runs the layers on packed tokens where the frame says so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in stock code. The layers are called as modules, so that their hooks and checkpointing work."""
        if "cu_seq_lens_q" in kwargs and STATE in self.__dict__:
            refuse_borders(config_of(self, self.__dict__[STATE]), kwargs)
        if traced():
            return super().forward(*args, **kwargs)
        frames = calls.frames
        if frames and frames[-1].encoder is self:
            return _run(self, frames[-1], args, kwargs)
        # Somebody called `forward` of the model, not the model, as sentence-transformers 6 does, or this encoder alone.
        frame = Frame(None, self)
        frames.open(frame, calls.heads)
        try:
            if STATE not in self.__dict__:  # unpatched meanwhile
                return stock_class(type(self)).forward(self, *args, **kwargs)
            plan = plan_encoder(frame, bind(stock_class(type(self)), args, kwargs))
            if type(plan) is Refusal:
                frame.rectangle = plan
            else:
                frame.packing = plan
            return _run(self, frame, args, kwargs)
        finally:
            frames.remove(frame)

    def _stock(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def _run(encoder: Any, frame: Frame, args: tuple, kwargs: dict) -> Any:
    if frame.packing is not None:
        output = _run_packed(encoder, frame, bind(stock_class(type(encoder)), args, kwargs))
    else:
        output = encoder._stock(*args, **kwargs)
    count(encoder.__dict__[STATE], frame)
    return output


def _run_packed(encoder: nn.Module, frame: Frame, arguments: dict[str, Any]) -> Any:
    packing: Any = frame.packing
    family, defaults = encoder.__dict__[STATE].family, parameters_of(stock_class(type(encoder)))
    # The first two are the hidden states and the mask, whatever they are called.
    hidden_states, mask = (arguments.get(name) for name in tuple(defaults)[:2])
    bias = None
    if family.position_bias is not None:
        longest = packing.max_seqlen if packing.is_flat else packing.seq_len
        bias = getattr(encoder, family.position_bias)(hidden_states.new_empty(1, longest, 0))
    # The embeddings gave a true rectangle, which hooks, adapters and stock code in between may look at and change.
    # The two copies cost 0.2 % of a forward pass (0.8 ms of 465 on MiniLM, 64 sentences in 128 columns, one core).
    x = packing.pack(hidden_states)
    out = None if frame.snapshot is None or bias is not None else frame.snapshot.native.run(x, packing)
    if out is None:
        x = _run_layers(encoder, x, Ticket(packing, mask, bias, frame.snapshot))
    else:
        x, frame.fused, frame.native = out, True, True
    hidden = packing.pad(x)
    if encoder.__dict__[STATE].padding == "drop" and packing.indices is not None:
        hidden[:, 0] = _first_tokens(x, packing)
    if returns_tuples(family) and not arguments.get("return_dict", defaults["return_dict"]):
        return (hidden,)
    return getattr(sys.modules[family.module], family.encoder_output)(last_hidden_state=hidden)


def _run_layers(encoder: nn.Module, x: Tensor, ticket: Ticket) -> Tensor:
    for layer in encoder.layer:
        out = layer(x, ticket)
        x = out[0] if isinstance(out, tuple) else out
    return x


def _first_tokens(x: Tensor, packing: Packing) -> Tensor:
    """(batch, hidden): each sequence's first token, for heads that look for it at position 0; 0 where there is none."""
    first = x.index_select(0, packing.cu_seqlens[:-1].clamp(max=x.shape[0] - 1))
    return first if 0 not in packing.lengths else first * (packing.cu_seqlens.diff() > 0)[:, None]


class LayerSeam:
    """Mixed into the layer's class: the fused layer, on packed tokens or on the rectangle; stock code otherwise."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in stock code; (tokens, hidden) and a `Ticket` in place of hidden states and mask in a packed call."""
        ticket = args[1] if len(args) == 2 and type(args[1]) is Ticket else None
        state = self.__dict__.get(STATE)
        if ticket is None and (state is None or traced()):  # no state: unpatched meanwhile
            return stock_class(type(self)).forward(self, *args, **kwargs)
        if ticket is not None and ticket.snapshot is not None:
            x, reading = args[0], ticket.snapshot.layers.get(self)
            if reading is not None and x.dtype is reading.parameters.up_weight.dtype:
                return _fused(state, x, _packed_attention(ticket, reading), reading, not autocast(x))
        if ticket is None:
            # The first two are the hidden states and the mask, whatever they are called.
            others = bind(stock_class(type(self)), args, kwargs)
            x, mask = (others.pop(name, None) for name in tuple(parameters_of(stock_class(type(self))))[:2])
        else:
            x = args[0]
        structure = state.structure
        if ticket is None or structure is None or structure.owner is not self:
            structure = structure_of(self, state, LayerStructure)
        reading: Any = structure
        if type(structure) is not Refusal and ticket is None:  # a packed call has asked all layers before it began
            reading = structure.refusal() or refuse_config(structure.config)
        if type(reading) is not Refusal:
            reading = structure.read(x)
        if type(reading) is not Refusal:
            if ticket is not None:
                attend = _packed_attention(ticket, reading)
            else:
                bias = None if state.family.position_bias is None else others.pop("position_bias", None)
                attend = refuse_keywords(others) or _rectangle_attention(x, mask, bias, reading, structure.adds_mask)
            reading = attend if type(attend) is Refusal else reading
        if type(reading) is Refusal:
            if calls.frames:
                calls.frames[-1].reasons.add(f"layer: {reading}")
            if ticket is None:
                return super().forward(*args, **kwargs)
            return _repack(ticket, super().forward, x, reading)
        rows = x if ticket is not None else x.reshape(-1, x.shape[-1])
        keep = state.structure is structure and _keeps_weights(self, reading)
        out = _fused(state, rows, attend, reading, keep)
        return out if ticket is not None else _viewed(out, x.shape)


def _fused(state: LayerState, x: Tensor, attend: Callable[[Tensor], Tensor], reading: LayerReading, keep: bool) -> Any:
    """What the layer returns for these rows. keep: whether its weights can be recognised in the next call."""
    if calls.frames:
        calls.frames[-1].fused = True
    out = encoder_layer(x, attend, reading.parameters, reading.settings, state.packs if keep else LayerPacks())
    return (out, *state.family.layer_tail) if returns_tuples(state.family) else out


def _viewed(out: Any, shape: torch.Size) -> Any:
    return (out[0].view(shape), *out[1:]) if isinstance(out, tuple) else out.view(shape)


def _repack(ticket: Ticket, forward: Callable[..., Any], x: Tensor, reason: Refusal) -> Any:
    """A stock layer's output for packed tokens, by way of the rectangle."""
    packing = ticket.packing
    if packing.is_flat:
        raise flattened.mixing(reason)
    bias = {} if ticket.bias is None else {"position_bias": ticket.bias}
    out = forward(packing.pad(x), ticket.mask, **bias)
    if isinstance(out, tuple):
        return (packing.pack(out[0]), *out[1:])
    return packing.pack(out)


def _keeps_weights(layer: nn.Module, reading: LayerReading) -> bool:
    """Whether the weights of this call can be recognised in the next one, so that packing them is worth while.

    Under autocast they are cast anew in every call. FSDP gathers them into the same memory behind autograd's back.
    """
    weight = reading.parameters.up_weight
    return not autocast(weight) and is_seam(layer) and not hasattr(weight, "_fsdp_flattened")


def autocast(x: Tensor) -> bool:
    """Whether GEMMs convert what they get on this tensor's device."""
    return torch.is_autocast_enabled(x.device.type)


def _packed_attention(ticket: Ticket, reading: LayerReading) -> Callable[[Tensor], Tensor]:
    packing, dropout = ticket.packing, reading.settings.attention_dropout
    if ticket.bias is not None:
        return functools.partial(
            biased_attention, lengths=packing.lengths, bias=ticket.bias, scale=reading.scale, dropout_p=dropout
        )
    return functools.partial(
        varlen_attention,
        cu_seqlens=packing.cu_seqlens,
        max_seqlen=packing.max_seqlen,
        order=packing.order,
        scale=reading.scale,
        dropout_p=dropout,
    )


def _rectangle_attention(
    hidden_states: Tensor, mask: Tensor | None, bias: Tensor | None, reading: LayerReading, eager: bool
) -> Callable[[Tensor], Tensor] | Refusal:
    """Attention over all positions with what stock code made: a boolean mask or one to be added, and a bias."""
    if hidden_states.dim() != 3:
        return Refusal(f"hidden states of {hidden_states.dim()} dimensions")
    batch, seq_len, _ = hidden_states.shape
    if mask is None and bias is None:
        return _packed_attention(Ticket(Packing.full(batch, seq_len, hidden_states.device), None), reading)
    heads = reading.settings.heads
    if isinstance(mask, Tensor) and mask.dim() == 2:  # DistilBERT's in transformers 4, which fills the others' scores
        lowest = torch.finfo(hidden_states.dtype).min
        mask = torch.zeros_like(mask, dtype=hidden_states.dtype).masked_fill(mask == 0, lowest)[:, None, None]
    for added in (mask, bias):
        if added is None:
            continue
        if not isinstance(added, Tensor) or added.dim() != 4:
            return Refusal("an attention mask of unknown form")
        if any(n not in (1, whole) for n, whole in zip(added.shape, (batch, heads, seq_len, seq_len), strict=True)):
            return Refusal(f"an attention mask of shape {tuple(added.shape)}")
        if added.dtype != hidden_states.dtype and (eager or added.dtype != torch.bool):
            return Refusal(f"an attention mask of {added.dtype}")
    total = mask if bias is None else bias if mask is None else mask + bias
    p = reading.settings.attention_dropout

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(batch, seq_len, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        added = total if total.dtype == torch.bool else total.to(q.dtype)
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
    for family in families():
        if name in (family.embeddings, family.encoder, family.layer):
            return seam_class(getattr(importlib.import_module(family.module), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
