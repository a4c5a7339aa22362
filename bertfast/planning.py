"""Decides whether a call can run without padding, and if not, why: for the base model's hook and for the encoder.

The hooks on a base model and on the task model around it see the call as the user made it. Some callers, such as
sentence-transformers 6, call `model.forward` and so get past the hooks; then the encoder plans from what it sees.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bertfast import flattened, word_loss
from bertfast.architectures import Family, bind, is_legacy, parameters_of, stock_class
from bertfast.calls import STATE, BackboneState, Frame, HeadCall, HeadState, LayerState, calls, structure_of
from bertfast.eligibility import (
    INERT,
    SDPA,
    EmbeddingStructure,
    LayerStructure,
    Refusal,
    hooks_matter,
    refuse_config,
    refuse_kind,
    traced,
)
from bertfast.guard import global_hooks
from bertfast.ops.loss import IGNORED
from bertfast.packing import Packing, has_holes
from bertfast.positions import position_ids
from bertfast.snapshot import take

# What heads read of a batch in one row: token by token. The others are given a rectangle.
_BY_TOKEN = ("tokens", "labels")


def before_head(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a task model: what its head will read, and the labels; a batch that never was padded."""
    state = model.__dict__.get(STATE)
    if state is None:
        return None
    if traced():
        refuse_borders(model.config, kwargs)
        return None
    base = getattr(model, state.family.prefix)
    head = HeadCall(model, base)
    calls.heads.open(head, calls.frames)
    if model.__dict__.get(STATE) is not state:  # unpatched meanwhile
        calls.heads.pop()
        return None
    arguments = bind(type(model), args, kwargs)
    packing = _take_flattened(model, state.family, arguments)
    if packing is None:
        _fill(head, state, arguments, None)
        return None if head.words is None else ((), arguments)
    if STATE not in base.__dict__ or "_compiled_call_impl" in base.__dict__:
        raise flattened.mixing("the base model was replaced, wrapped or compiled after patching")
    if state.reads not in _BY_TOKEN or base.__dict__[STATE].pooled:
        if "MultipleChoice" in type(model).__name__:
            raise ValueError("multiple choice needs a rectangle of (batch, choices, seq_len): pad the batch")
        padding = getattr(model.config, "pad_token_id", None) or 0
        arguments, packing = flattened.to_rectangle(arguments, packing, padding, state.reads in ("labels", "all"))
    _fill(head, state, arguments, packing)
    return (), arguments


def _fill(head: HeadCall, state: HeadState, arguments: dict[str, Any], packing: Packing | None) -> None:
    """Note down what a task model was called with. Labels go out of the arguments where the loss is computed here."""
    head.labels, head.packing = arguments.get("labels"), packing
    head.words = None if state.output_logits else word_loss.take(head.model, arguments)


def _head_around(base: nn.Module) -> HeadCall | None:
    """The innermost call under way of a task model with this base model."""
    return next((head for head in reversed(calls.heads) if head.base is base), None)


def _take_flattened(model: nn.Module, family: Family, arguments: dict[str, Any]) -> Packing | None:
    if arguments.get("cu_seq_lens_q") is not None and _honours_borders(model.config):
        return None
    takes_positions = family.positions == "columns" and "position_ids" in parameters_of(type(model))
    return flattened.take(arguments, takes_positions)


def _honours_borders(config: Any) -> bool:
    """Whether stock code's own attention keeps apart the sequences of one row."""
    return getattr(config, "_attn_implementation", None) not in (None, "eager", *SDPA)


def refuse_borders(config: Any, kwargs: dict[str, Any]) -> None:
    """ValueError for the borders of a flattened call that stock code would be handed, and ignore."""
    if kwargs.get("cu_seq_lens_q") is not None and not _honours_borders(config):
        raise flattened.mixing("a tracer, or a caller of `forward`, came past the hooks on the model")


def pooled_tokens(pooler: nn.Module, args: tuple) -> tuple | None:
    """Forward pre-hook of a pooler, which takes position 0: in one row that is the first token of each sequence."""
    frame = calls.frames[-1] if calls.frames and not traced() else None
    if frame is None or frame.packing is None or not frame.packing.is_flat:
        return None
    return (args[0][0].index_select(0, frame.packing.cu_seqlens[:-1].long())[:, None],)


def span_logits(module: nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
    """Forward hook of the module that gives a span's logits: none begins in padding, where padding was dropped."""
    packing = calls.heads[-1].packing if calls.heads and not traced() else None
    if packing is None or packing.indices is None:
        return None
    valid = packing.pad(torch.ones(packing.tokens, dtype=torch.bool, device=logits.device))
    return logits.masked_fill(~valid[..., None], torch.finfo(logits.dtype).min)


def after_head(model: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a task model, called after errors too, without an output: the loss in place of words' scores."""
    heads = calls.heads
    if any(head.model is model for head in heads):
        while (head := heads.pop()).model is not model:
            pass
        if head.words is not None and output is not None:
            return head.words.finish(output)
    return None


def before_backbone(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a base model: opens the frame and decides whether the call is packed."""
    state = model.__dict__.get(STATE)
    if state is None:
        return None
    if traced():
        refuse_borders(model.config, kwargs)
        return None
    family = state.family
    frame = Frame(model, getattr(model, family.encoder_place, None))
    calls.frames.open(frame, calls.heads)
    if model.__dict__.get(STATE) is not state:  # unpatched meanwhile
        calls.frames.remove(frame)
        return None
    arguments = bind(type(model), args, kwargs)
    head = _head_around(model)
    known = _take_flattened(model, family, arguments) if head is None or head.packing is None else head.packing
    flat = known is not None and known.is_flat
    packing = _plan(frame, state, arguments, known)
    if flat and type(packing) is not Refusal and _pools_one_row(model, family):
        packing = Refusal("the pooler was replaced after patching")
    if type(packing) is Refusal:
        if flat:
            raise flattened.mixing(packing)
        frame.rectangle = packing
        return None
    frame.packing = packing
    if head is not None and state.padding == "drop":
        head.packing = packing
    if flat:
        return (), _in_one_row(model, family, arguments, packing)
    mask = arguments.get("attention_mask")
    # A hook of someone else may want to see the mask as it was given; then stock code expands it for nothing.
    if mask is None or len(model._forward_pre_hooks) > 1 or len(model._forward_hooks) > 1:
        return None
    small = None if packing.indices is None and not is_legacy(family) else _small_mask(model, family, mask)
    index = tuple(parameters_of(type(model))).index("attention_mask")
    if index < len(args):
        return (*args[:index], small, *args[index + 1 :]), kwargs
    return args, {**kwargs, "attention_mask": small}


def _pools_one_row(model: nn.Module, family: Family) -> bool:
    """Whether a pooler would take the first token of the row for that of every sequence."""
    pooler = None if family.pooler is None else getattr(model, family.pooler, None)
    return pooler is not None and pooled_tokens not in pooler._forward_pre_hooks.values()


def _in_one_row(model: nn.Module, family: Family, arguments: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """The arguments of a flattened call as stock code takes them, with each sequence's own positions."""
    named = parameters_of(type(model))
    if is_legacy(family) and "token_type_ids" in named and arguments.get("token_type_ids") is None:
        # Stock code has as many zeros as there are positions, and a row may be longer.
        device = packing.cu_seqlens.device
        arguments |= {"token_type_ids": torch.zeros(1, packing.tokens, dtype=torch.int64, device=device)}
    if arguments.get("position_ids") is None and "position_ids" in named:
        positions = position_ids(model.embeddings, family, packing, arguments.get("input_ids"))
        if positions is not None:
            return arguments | {"position_ids": positions[None]}
    return arguments


def after_backbone(model: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a base model, called after errors too, without an output: labelled tokens, if those will do."""
    frames = calls.frames
    if any(frame.model is model for frame in frames):
        while frames.pop().model is not model:
            pass
    head = _head_around(model)
    return None if head is None or head.words is None or output is None else head.words.select(output)


def _small_mask(model: nn.Module, family: Family, mask: Tensor) -> Tensor:
    """The mask in a form that stock code hands on to its layers without expanding it to every pair of positions."""
    if is_legacy(family):
        return mask if family.legacy_masks == 2 else mask[:, None, :]
    valid = mask.bool()[:, None, None, :]
    if model.config._attn_implementation in SDPA:
        return valid
    dtype = model.embeddings.word_embeddings.weight.dtype
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(valid, zero, torch.finfo(dtype).min)


def _plan(frame: Frame, state: BackboneState, arguments: dict[str, Any], known: Packing | None) -> Packing | Refusal:
    """How the call is packed, or why it runs on the rectangle. known: what the caller said of the batch."""
    reason = _refuse_call(frame, state.family, arguments)
    if reason is not None:
        return reason
    if known is not None:
        return known if known.tokens else Refusal("no valid token at all")
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    x, dims = (ids, 2) if embeds is None else (embeds, 3)
    if (ids is None) is (embeds is None) or not isinstance(x, Tensor) or x.dim() != dims:
        return Refusal("not one of input_ids and inputs_embeds for a batch of sequences")
    batch, seq_len = x.shape[:2]
    if batch * seq_len == 0:
        return Refusal("an empty batch")
    mask = arguments.get("attention_mask")
    if mask is None:
        return Packing.full(batch, seq_len, x.device)
    if not isinstance(mask, Tensor) or mask.shape != (batch, seq_len) or mask.device != x.device:
        return Refusal("an attention mask that is not (batch, seq_len) beside its input")
    return _pack(state, mask, frame.model)


def plan_encoder(frame: Frame, arguments: dict[str, Any]) -> Packing | Refusal:
    """How a call of the encoder that came past the base model's hook is packed, or why it runs on the rectangle.

    The mask is what stock code has expanded to (batch, 1, queries, keys), or DistilBERT's own in transformers 4.
    """
    encoder = frame.encoder
    state: BackboneState = encoder.__dict__[STATE]
    arguments = {k: v for k, v in arguments.items() if not _is_empty(v)}
    names = tuple(parameters_of(stock_class(type(encoder))))[:2]
    hidden_states, mask = (arguments.pop(name, None) for name in names)
    reason = _refuse_encoder(frame, arguments, config_of(encoder, state))
    if reason is not None:
        return reason
    if hidden_states.dim() != 3 or hidden_states.shape[:2].numel() == 0:
        return Refusal("hidden states that are not (batch, seq_len, hidden)")
    batch, seq_len, _ = hidden_states.shape
    if mask is None:
        return Packing.full(batch, seq_len, hidden_states.device)
    if mask.shape == (batch, seq_len):
        return _pack(state, mask, None)
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != seq_len:
        return Refusal("an attention mask of unknown form")
    keys = mask[:, :, :1]
    valid = keys if mask.dtype == torch.bool else keys == 0
    if not bool((mask == keys).all()):
        return Refusal("an attention mask for each query")
    if mask.dtype != torch.bool and not bool((valid | (keys <= torch.finfo(mask.dtype).min)).all()):
        return Refusal("an attention mask that adds other values")
    return _pack(state, valid[:, 0, 0].expand(batch, seq_len), None)


def _is_empty(value: object) -> bool:
    """Whether it is transformers 4's list of no head masks, one for each layer."""
    return isinstance(value, list) and all(item is None for item in value)


def config_of(encoder: nn.Module, state: BackboneState) -> Any:
    """The encoder's configuration, or that of its first layer, where it has one."""
    if "config" in encoder.__dict__ or not len(encoder.layer):
        return encoder.__dict__.get("config")
    return getattr(encoder.layer[0].get_submodule(state.family.self_attention), "config", None)


def _pack(state: BackboneState, mask: Tensor, model: nn.Module | None) -> Packing | Refusal:
    try:
        packing = Packing.from_mask(mask)
    except (TypeError, ValueError):
        return Refusal("an attention mask with values other than 0 and 1")
    if packing.indices is not None and state.family.position_bias is not None and has_holes(mask):
        return Refusal("relative positions of tokens with padding in between")
    if packing.indices is None or state.padding == "drop":
        return packing if packing.tokens else Refusal("no valid token at all")
    return _refuse_exact(model, state, mask, packing) or packing


def _refuse_call(frame: Frame, family: Family, arguments: dict[str, Any]) -> Refusal | None:
    model = frame.model
    if "forward" in model.__dict__:
        return Refusal("the model has a forward of its own")
    encoder, embeddings = model._modules.get(family.encoder_place), model._modules.get("embeddings")
    if encoder is None or embeddings is None or STATE not in encoder.__dict__ or STATE not in embeddings.__dict__:
        return Refusal("the encoder or the embeddings were replaced after patching")
    if "forward" in encoder.__dict__ or "_compiled_call_impl" in encoder.__dict__:
        return Refusal("the encoder was given another forward, or compiled, after patching")
    return _refuse_encoder(frame, arguments, model.__dict__.get("config"))


def _refuse_encoder(frame: Frame, arguments: dict[str, Any], config: Any) -> Refusal | None:
    """Why the layers cannot be handed packed tokens; where they can, and nothing has changed, the frame's snapshot."""
    for name, value in arguments.items():
        if value is not None and value is not False and name not in _BASE_ARGUMENTS:
            return Refusal("attentions wanted" if name == "output_attentions" else f"argument {name}")
    if global_hooks():
        return Refusal("hooks on all modules")
    hidden_states = arguments.get("output_hidden_states")
    backbone: BackboneState = frame.encoder.__dict__[STATE]
    snapshot = backbone.snapshot
    if snapshot is not None and snapshot.is_of(frame.encoder, config) and snapshot.guard.holds():
        frame.snapshot = snapshot
        reason = refuse_kind(snapshot.weight.dtype, snapshot.weight.device)
    else:
        if hidden_states is None:
            hidden_states = getattr(config, "output_hidden_states", False)
        reason = refuse_config(config) or _refuse_layers(frame.encoder, config)
        if reason is None and not hidden_states and not getattr(frame.encoder, "_is_replica", False):
            if frame.model is not None:
                structure_of(frame.model._modules["embeddings"], backbone, EmbeddingStructure)
            backbone.snapshot = frame.snapshot = take(backbone, frame.encoder, config)
    return Refusal("hidden states wanted") if hidden_states else reason


def _refuse_layers(encoder: nn.Module, config: Any) -> Refusal | None:
    for i, layer in enumerate(encoder.layer):
        d = layer.__dict__
        state = d.get(STATE)
        if not isinstance(state, LayerState) or "forward" in d or "_compiled_call_impl" in d:
            return Refusal(f"layer {i} was replaced or compiled after patching")
        if (
            d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]
        ) and hooks_matter(layer):
            return Refusal(f"layer {i} has hooks, which want to see the rectangle")
        structure = structure_of(layer, state, LayerStructure)
        reason = structure if type(structure) is Refusal else structure.refusal()
        if reason is None and structure.config is not config:  # which was asked already
            reason = refuse_config(structure.config)
        if reason is None and i == 0 and structure.dtype is not None:
            reason = refuse_kind(structure.dtype, structure.device)
        if reason is not None:
            return Refusal(f"layer {i}: {reason}")
    return None


# Arguments of a base model that a packed call honours or that change nothing; others have to be None or False.
_BASE_ARGUMENTS = INERT | {
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "return_dict", "use_cache",
}  # fmt: skip


def _refuse_exact(model: nn.Module | None, state: BackboneState, mask: Tensor, packing: Packing) -> Refusal | None:
    """Why this padded batch has to keep stock's numbers at padding positions: something will read them."""
    if 0 in packing.lengths:
        return Refusal("exact padding: a sequence without valid tokens")
    if state.reads in ("span", "all"):
        return Refusal("exact padding: the head reads padding positions")
    if state.reads == "labels":
        head = None if model is None else _head_around(model)
        if head is None:
            return Refusal("exact padding: a call past the head, whose labels are not known")
        if (labels := head.labels) is not None:
            if not isinstance(labels, Tensor) or labels.numel() != mask.numel():
                return Refusal("exact padding: labels that do not fit the mask")
            if bool(((labels.reshape(mask.shape).to(mask.device) != IGNORED) & (mask == 0)).any()):
                return Refusal("exact padding: labels at padding positions")
    if (state.pooled or state.reads == "first") and not bool(mask[:, 0].all()):
        reader = "pooler" if state.pooled else "head"
        return Refusal(f"exact padding: the {reader} reads position 0, which is padding")
    return None
