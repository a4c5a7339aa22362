"""attn_implementation="bertfast": packed attention for models of transformers 5 that `bertfast.patch` does not know.

transformers asks twice: once a forward for a mask, and in every layer for attention. The mask given here is one of
transformers' own for "sdpa", always. So whatever a model does to it on the way, and wherever a layer cannot run packed,
"sdpa" takes over from there with stock's numbers. Where nothing but padding is masked, the mask is noted down with its
`Packing`, and a layer that is handed this very mask drops the padding, attends inside each sequence, and puts zeros
back in the padding. Heads that read padding positions (a pooler under left padding, the logits of spans) so see other
numbers there than stock's; `bertfast.patch` has an option to keep them.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bertfast import backend
from bertfast.eligibility import INERT, Refusal, refuse_keywords, traced
from bertfast.errors import UnsupportedModelError
from bertfast.flattened import check_row, read_borders
from bertfast.ops import varlen_attention
from bertfast.packing import Packing

NAME = "bertfast"

# How many layers' calls ran "packed", and of the others how many ran transformers' sdpa for which reason.
counts: Counter[str] = Counter()


def register_attention() -> str:
    """Make `attn_implementation="bertfast"` known to transformers, for attention and for masks. Returns that name.

    Afterwards `from_pretrained(..., attn_implementation="bertfast")`, a configuration with it, and
    `model.set_attn_implementation("bertfast")` work for every model that transformers can run on "sdpa" through its
    attention interface. Registering again changes nothing. Raises ImportError without transformers, and
    UnsupportedModelError where transformers is older than 5: BERT has no attention interface there.
    """
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise UnsupportedModelError(
            f'attn_implementation="{NAME}" needs transformers 5, and this is {transformers.__version__}, whose '
            "encoders have no attention interface: use bertfast.patch(model), or upgrade transformers"
        )
    torch.compiler.assume_constant_result(_without_sdpa)  # a trace would go through all classes with it
    # Without a mask of its own, transformers would hand the layers none at all, and padding would be attended to.
    transformers.AttentionMaskInterface.register(NAME, make_mask)
    transformers.AttentionInterface.register(NAME, attend)
    return NAME


def make_mask(**arguments: Any) -> Tensor | None:
    """The mask that transformers' `sdpa_mask` makes of these arguments, noted down where it is padding and no more.

    Waits for the device once. Raises UnsupportedModelError for a model that transformers cannot run on "sdpa".
    """
    from transformers.masking_utils import sdpa_mask

    # Stock leaves a causal mask out and relies on `is_causal`. A model that goes on to drop queries, or has a cache
    # with room to spare, knows not to by the name "sdpa".
    arguments["allow_is_causal_skip"] = False
    if refused := _without_sdpa(type(arguments.get("config"))):
        raise UnsupportedModelError(
            f'{refused} does not run on transformers\' "sdpa", on which "{NAME}" is built: load it with '
            'attn_implementation="eager"; bertfast.patch may know it'
        )
    if traced() or not _masks_padding_only(arguments):
        return sdpa_mask(**arguments)
    packing = Packing.from_mask(arguments["attention_mask"])
    if packing.indices is None:
        return None
    arguments["allow_is_bidirectional_skip"] = False  # or stock would look for padding too, and wait
    mask = sdpa_mask(**arguments)
    _note(mask, packing)
    return mask


def _masks_padding_only(arguments: dict[str, Any]) -> bool:
    """Whether what is wanted is a mask of the padding alone, for as many queries as keys.

    `allow_is_bidirectional_skip` is stock's word for it: without padding, and with a window that spans all keys, it
    would make no mask.
    """
    valid, window = arguments.get("attention_mask"), arguments.get("local_size")
    queries = arguments["q_length"] if "q_length" in arguments else len(arguments["cache_position"])
    offsets = arguments.get("q_offset", 0), arguments.get("kv_offset", 0)
    return (
        bool(arguments.get("allow_is_bidirectional_skip"))
        and type(valid) is Tensor
        and valid.dtype == torch.bool
        and valid.shape == (arguments["batch_size"], arguments["kv_length"])
        and queries == valid.shape[1]
        and (window is None or queries < window)
        and all(isinstance(offset, int) and offset == 0 for offset in offsets)
    )


_refused: dict[type, str | None] = {}


def _without_sdpa(config: type) -> str | None:
    """The name of a model with this class of configuration, where transformers runs none of them on "sdpa".

    Such a model adds its masks to the scores, or needs what sdpa has not. transformers refuses "sdpa" to it, but no
    name that it does not know. The models of a configuration are loaded when the first one asks for a mask.
    """
    if config not in _refused:
        from transformers import PreTrainedModel

        models = [model for model in _subclasses(PreTrainedModel) if model.config_class is config]
        supported = not models or any(model._supports_sdpa for model in models)
        _refused[config] = None if supported else models[0].__name__
    return _refused[config]


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """dropout(softmax(scaling q k^T)) v over valid tokens, for each head, as transformers' attention functions do.

    Args:
        module: the layer's attention; `is_causal` is read where the call does not say.
        query, key, value: (batch, heads, seq_len, head_size).
        attention_mask: what `make_mask` made, or any other mask that sdpa takes.
        dropout: of the probabilities, in `varlen_attention`'s steps of 1 / 256.
        scaling: of the scores; defaults to 1 / sqrt(head_size).
        kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, (sequences + 1,), as of DataCollatorWithFlattening, are the borders
            of sequences in a batch of one row, which attend to themselves only. Others are transformers' own.

    Returns (batch, seq_len, heads, head_size), zeros at padding that was dropped, and None for the probabilities.
    Whatever is not plain bidirectional self attention runs transformers' sdpa; `counts` says how often and why.
    Raises ValueError for what neither can do: soft caps, attention sinks, head masks, sparse indexers, paged caches,
    and borders that are no borders, differ between queries and keys, or come with a position bias or under
    torch.compile.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if beyond := [name for name in _BEYOND_SDPA if kwargs.get(name) is not None]:
        raise ValueError(f'attn_implementation="{NAME}" knows nothing of {beyond[0]}: use "sdpa" or "eager"')
    stock = functools.partial(sdpa_attention_forward, module, dropout=dropout, scaling=scaling, **kwargs)
    borders = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    flat = any(b is not None for b in borders)
    if traced():
        if flat:
            raise ValueError("cu_seq_lens under torch.compile or another tracer: their values cannot be checked there")
        return stock(query, key, value, attention_mask)
    row = _row(*borders, query, key, kwargs) if flat else None
    plan = _refuse_call(query, key, value, dropout, scaling, kwargs) or _plan(
        module, query, attention_mask, kwargs.get("is_causal"), row
    )
    counts["packed" if isinstance(plan, Packing) else plan] += 1
    if isinstance(plan, Packing):
        qkv = torch.stack([plan.pack(x.transpose(1, 2)) for x in (query, key, value)], dim=1)
        out = varlen_attention(
            qkv,
            plan.cu_seqlens,
            max_seqlen=plan.max_seqlen,
            order=plan.order,
            scale=scaling,
            dropout_p=dropout,
        )
        return plan.pad(out), None
    if row is not None:
        return _one_by_one(stock, row, query, key, value, attention_mask), None
    return stock(query, key, value, attention_mask)


# transformers' sdpa refuses the first and ignores the next three. For the others it relies on masks that are made only
# where the attention is called "sdpa": of a sparse indexer's choice, and of the sequences in a paged cache.
_BEYOND_SDPA = ("softcap", "s_aux", "sinks", "head_mask", "indices", "block_indices", "cache")
# Keywords of a call that are read here, or say what the mask says too.
_READ = INERT | {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal", "sliding_window", "deterministic",
    "use_cache",
}  # fmt: skip


def _plan(
    module: nn.Module, query: Tensor, mask: Tensor | None, causal: bool | None, row: Packing | None
) -> Packing | Refusal:
    """How a call that the op can take is packed, or why it runs transformers' sdpa."""
    batch, _, seq_len, _ = query.shape
    if mask is None:
        if seq_len > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
            return Refusal("causal attention")
        return row or Packing.full(batch, seq_len, query.device)
    packing = _noted(mask) if row is None else None
    if packing is None or (packing.batch, packing.seq_len) != (batch, seq_len):
        return Refusal("a mask of more than padding")
    if not _attends_to_itself(type(module)):
        return Refusal("a module that may attend to another sequence")
    return packing


def _refuse_call(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, kwargs: dict[str, Any]
) -> Refusal | None:
    """Why the op cannot take these arguments, or stock would compute with others."""
    reason = refuse_keywords({name: wanted for name, wanted in kwargs.items() if name not in _READ})
    if reason is not None:
        return reason
    if dropout >= 1.0:
        return Refusal("a dropout of everything")
    if isinstance(scaling, Tensor):
        return Refusal("a scale that is a tensor")
    if any(type(t) is not Tensor for t in (query, key, value)):
        return Refusal(f"a {type(query).__name__}")
    if query.dim() != 4 or query.numel() == 0:
        return Refusal("queries that are not (batch, heads, seq_len, head_size)")
    if key.shape[2] != query.shape[2]:
        return Refusal("fewer or more keys than queries")
    if key.shape != query.shape or value.shape != query.shape:
        return Refusal("key or value heads of another number or size")
    dtype, device = query.dtype, query.device
    if any(t.dtype != dtype or t.device != device for t in (key, value)):
        return Refusal("tensors of several dtypes or devices")
    if torch.is_autocast_enabled(device.type) and dtype != torch.get_autocast_dtype(device.type):
        return Refusal("autocast to another dtype")
    if not _has_kernel(device, dtype, query.shape[3], backend.current()):
        return Refusal(
            f"no kernel for {str(dtype).removeprefix('torch.')} and heads of {query.shape[3]} on {device.type}"
        )
    return None


@functools.lru_cache
def _has_kernel(device: torch.device, dtype: torch.dtype, head_size: int, chosen: str) -> bool:
    """Whether there are kernels for such tensors, for sequences of any length, both ways; the reference is slower than
    sdpa. A backend that was chosen by name has to run.
    """
    shape = head_size, 1 << 31
    return chosen != "auto" or all(
        backend.explain(op, device, dtype, shape).backend != "reference"
        for op in ("varlen_attention", "varlen_attention_backward")
    )


# Of a module's forward that is given one sequence.
_OWN = frozenset((
    "self", "hidden_states", "attention_mask", "position_embeddings", "position_ids", "past_key_values", "use_cache",
    "cache_position", "output_attentions",
))  # fmt: skip


@functools.cache
def _attends_to_itself(kind: type[nn.Module]) -> bool:
    """Whether forward is given one sequence alone, so that the keys that are padding are the queries that are.

    With another one beside it (`key_value_states`, `encoder_hidden_states`, ...) the mask may be that one's, and the
    two of one length by chance.
    """
    parameters = inspect.signature(kind.forward).parameters.values()
    return all(p.kind is p.VAR_KEYWORD or p.name in _OWN for p in parameters)


def _row(q: Tensor | None, k: Tensor | None, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Packing:
    """The packing of the sequences between these borders, (sequences + 1,), in a batch of one row.

    The borders are read, and the device waited for, in the first layer of a forward.
    """
    if kwargs.get("position_bias") is not None:
        raise ValueError("cu_seq_lens with a position bias, which is that of one sequence")
    if q is None or k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k have to come together")
    packing = _noted(q)
    if packing is None or packing is not _noted(k):
        packing = read_borders(q, k, query.device)
        if not (q.is_inference() or k.is_inference()):  # nobody counts what is written to those
            _note(q, packing)
            _note(k, packing)
    check_row(packing, query.shape[0], query.shape[2], "queries")
    check_row(packing, key.shape[0], key.shape[2], "keys")
    return packing


def _one_by_one(
    stock: Callable[..., tuple[Tensor, None]],
    row: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Stock's attention on each sequence of the row by itself, (1, tokens, heads, head_size): sdpa knows no borders."""
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], row.tokens, row.tokens)
    outputs = []
    for start, end in pairwise(accumulate(row.lengths, initial=0)):
        if start < end:
            part = slice(start, end)
            own = None if mask is None else mask[..., part, part]
            outputs.append(stock(query[:, :, part], key[:, :, part], value[:, :, part], own)[0])
    return torch.cat(outputs, dim=1)


_NOTE = "_bertfast_packing"


def _note(tensor: Tensor, packing: Packing) -> None:
    """Note the packing down on the tensor's memory.

    Unlike an attribute of the tensor it outlives `detach`, which reentrant checkpointing calls before it runs a layer
    again; that run has to go the same way as the first, as the dropout of the two ways differs.
    """
    setattr(tensor.untyped_storage(), _NOTE, (_view(tensor), packing))


def _noted(tensor: Tensor) -> Packing | None:
    """The packing that was noted down for this tensor, if it is the same view of its memory and unchanged."""
    if type(tensor) is not Tensor:
        return None
    view, packing = getattr(tensor.untyped_storage(), _NOTE, (None, None))
    return packing if view == _view(tensor) else None


def _view(tensor: Tensor) -> tuple:
    """What tells a tensor from others of the same memory, and from itself before somebody wrote to it.

    Inference tensors do not count writes; none of transformers' models writes to its mask.
    """
    version = None if tensor.is_inference() else tensor._version
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, version
