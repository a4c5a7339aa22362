"""Decides whether a call can run without padding, and if not, why: for the base model's hook and for the encoder.

The hooks on a base model and on the task model around it see the call as the user made it. Some callers, such as
sentence-transformers 6, call `model.forward` and so get past the hooks; then the encoder plans from what it sees.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from bertfast.calls import STATE, BackboneState, Frame, LayerState, calls, structure_of
from bertfast.eligibility import (
    INERT,
    LayerStructure,
    Refusal,
    global_hooks,
    hooks_matter,
    refuse_config,
    refuse_kind,
    traced,
)
from bertfast.families import Reads, is_legacy
from bertfast.packing import Packing

_IGNORED_LABEL = -100


@functools.cache
def _parameter_names(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def before_head(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a task model: what its head will read, and the labels."""
    state = model.__dict__.get(STATE)
    if state is None or traced():
        return
    labels = kwargs.get("labels")
    names = _parameter_names(type(model))
    if labels is None and "labels" in names and names.index("labels") < len(args):
        labels = args[names.index("labels")]
    calls.heads.append((model, getattr(model, state.family.prefix), labels))


def after_head(model: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a task model, called after errors too."""
    heads = calls.heads
    if any(head[0] is model for head in heads):
        while heads.pop()[0] is not model:
            pass


def before_backbone(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a base model: opens the frame and decides whether the call is packed."""
    state = model.__dict__.get(STATE)
    if state is None or traced():
        return None
    frame = Frame(model, getattr(model, "encoder", None))
    calls.frames.append(frame)
    names = _parameter_names(type(model))
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    packing = _plan(model, state, arguments)
    if type(packing) is Refusal:
        frame.rectangle = packing
        return None
    frame.packing = packing
    mask = arguments.get("attention_mask")
    # A hook of someone else may want to see the mask as it was given; then stock code expands it for nothing.
    if mask is None or len(model._forward_pre_hooks) > 1 or len(model._forward_hooks) > 1:
        return None
    small = _small_mask(model, state, mask)
    index = names.index("attention_mask")
    if index < len(args):
        return (*args[:index], small, *args[index + 1 :]), kwargs
    return args, {**kwargs, "attention_mask": small}


def after_backbone(model: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a base model, called after errors too."""
    frames = calls.frames
    if any(frame.model is model for frame in frames):
        while frames.pop().model is not model:
            pass


def _small_mask(model: nn.Module, state: BackboneState, mask: Tensor) -> Tensor:
    """The mask in a form that stock code hands on to its layers without expanding it to every pair of positions."""
    if is_legacy(state.family):
        return mask[:, None, :]
    valid = mask.bool()[:, None, None, :]
    if model.config._attn_implementation == "sdpa":
        return valid
    dtype = model.embeddings.word_embeddings.weight.dtype
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(valid, zero, torch.finfo(dtype).min)


def _plan(model: nn.Module, state: BackboneState, arguments: dict[str, Any]) -> Packing | Refusal:
    """How the call is packed, or why it runs on the rectangle."""
    reason = _refuse_call(model, arguments)
    if reason is not None:
        return reason
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
    pooled = getattr(model, state.family.pooler, None) is not None
    return _pack(state, mask, model, pooled)


def plan_encoder(
    encoder: nn.Module, hidden_states: Tensor, mask: Tensor | None, args: tuple, kwargs: dict
) -> Packing | Refusal:
    """How a call of the encoder that came past the base model's hook is packed, or why it runs on the rectangle.

    The mask is what stock code has expanded to (batch, 1, queries, keys).
    """
    state: BackboneState = encoder.__dict__[STATE]
    arguments = {k: v for k, v in kwargs.items() if not _is_empty(v)}
    if any(a is not None for a in args):
        return Refusal("positional arguments of the encoder")
    reason = _refuse_arguments(arguments, encoder.config) or _refuse_structure(encoder)
    if reason is not None:
        return reason
    if hidden_states.dim() != 3 or hidden_states.shape[:2].numel() == 0:
        return Refusal("hidden states that are not (batch, seq_len, hidden)")
    batch, seq_len, _ = hidden_states.shape
    if mask is None:
        return Packing.full(batch, seq_len, hidden_states.device)
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != seq_len:
        return Refusal("an attention mask of unknown form")
    keys = mask[:, :, :1]
    valid = keys if mask.dtype == torch.bool else keys == 0
    if not bool((mask == keys).all()):
        return Refusal("an attention mask for each query")
    if mask.dtype != torch.bool and not bool((valid | (keys <= torch.finfo(mask.dtype).min)).all()):
        return Refusal("an attention mask that adds other values")
    return _pack(state, valid[:, 0, 0].expand(batch, seq_len), None, state.pooled)


def _is_empty(value: object) -> bool:
    """Whether it is transformers 4's list of no head masks, one for each layer."""
    return isinstance(value, list) and all(item is None for item in value)


def _pack(state: BackboneState, mask: Tensor, model: nn.Module | None, pooled: bool) -> Packing | Refusal:
    try:
        packing = Packing.from_mask(mask)
    except (TypeError, ValueError):
        return Refusal("an attention mask with values other than 0 and 1")
    if packing.indices is None or state.padding == "drop":
        return packing if packing.tokens else Refusal("no valid token at all")
    return _refuse_exact(model, state.reads, pooled, mask, packing) or packing


def _refuse_call(model: nn.Module, arguments: dict[str, Any]) -> Refusal | None:
    reason = _refuse_arguments(arguments, model.config)
    if reason is not None:
        return reason
    if "forward" in model.__dict__:
        return Refusal("the model has a forward of its own")
    encoder, embeddings = model._modules.get("encoder"), model._modules.get("embeddings")
    if encoder is None or embeddings is None or STATE not in encoder.__dict__ or STATE not in embeddings.__dict__:
        return Refusal("the encoder or the embeddings were replaced after patching")
    return _refuse_structure(encoder)


def _refuse_arguments(arguments: dict[str, Any], config: Any) -> Refusal | None:
    for name, value in arguments.items():
        if value is not None and value is not False and name not in _BASE_ARGUMENTS:
            return Refusal("attentions wanted" if name == "output_attentions" else f"argument {name}")
    wanted = arguments.get("output_hidden_states")
    if (config.output_hidden_states if wanted is None else wanted) is not False:
        return Refusal("hidden states wanted")
    return refuse_config(config)


def _refuse_structure(encoder: nn.Module) -> Refusal | None:
    """Why the layers cannot be handed packed tokens."""
    if global_hooks():
        return Refusal("hooks on all modules")
    config = encoder.config
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


def _refuse_exact(
    model: nn.Module | None, reads: Reads | None, pooled: bool, mask: Tensor, packing: Packing
) -> Refusal | None:
    """Why this padded batch has to keep stock's numbers at padding positions: something will read them."""
    if 0 in packing.lengths:
        return Refusal("exact padding: a sequence without valid tokens")
    if reads == "always":
        return Refusal("exact padding: the head reads padding positions")
    if reads == "labels":
        known = [labels for _, base, labels in calls.heads if base is model]
        if not known:
            return Refusal("exact padding: a call past the head, whose labels are not known")
        if (labels := known[-1]) is not None:
            if not isinstance(labels, Tensor) or labels.numel() != mask.numel():
                return Refusal("exact padding: labels that do not fit the mask")
            if bool(((labels.reshape(mask.shape).to(mask.device) != _IGNORED_LABEL) & (mask == 0)).any()):
                return Refusal("exact padding: labels at padding positions")
    if pooled and not bool(mask[:, 0].all()):
        return Refusal("exact padding: the pooler reads position 0, which is padding")
    return None
