"""Batches that never were padded, as arguments of a model of transformers: all tokens in one row, and the borders.

The form is that of transformers' DataCollatorWithFlattening: ids are (1, tokens), `cu_seq_lens_q` says where sequences
begin. `patch` makes models take it, and `PackedBatch` objects too. Heads that compute token by token work on the one
row. Those that read whole sequences (the first token, a span) get a rectangle of hidden states, of ids and of labels,
which is made of what the encoder computed without padding.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bertfast.packing import PackedBatch, Packing

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_IGNORED_LABEL = -100
_BY_TOKEN = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
_ANSWERS = ("start_positions", "end_positions")


def take(arguments: dict[str, Any], takes_positions: bool) -> Packing | None:
    """The packing of a flattened call, whose arguments are made those of one row; None for any other call.

    Takes the borders, or the PackedBatch that stands in place of `input_ids`, out of the arguments. takes_positions:
    whether the model counts positions as a PackedBatch does, and takes them. Raises ValueError where the arguments do
    not fit one another.
    """
    batch = arguments.get("input_ids")
    if isinstance(batch, PackedBatch):
        row = batch.flattened()
        if takes_positions:
            row["position_ids"] = batch.position_ids[None]
        said = ("attention_mask", *_BY_TOKEN[1:], *BORDERS, *(("labels",) if batch.labels is not None else ()))
        given = [name for name in said if arguments.get(name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)} given beside a PackedBatch, which says everything itself")
        arguments.update((name, value) for name, value in row.items() if name not in BORDERS)
        if 0 in batch.packing.lengths:
            raise ValueError(f"an empty sequence (number {batch.packing.lengths.index(0)}): leave it out")
        return batch.packing.flat()
    borders = {name: arguments.pop(name, None) for name in BORDERS}
    if borders["cu_seq_lens_q"] is None:
        if given := [name for name, value in borders.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} without cu_seq_lens_q, which says where sequences begin")
        return None
    return _packing(arguments, borders["cu_seq_lens_q"], borders["cu_seq_lens_k"])


def _packing(arguments: Mapping[str, Any], cu_seqlens: Tensor, keys: Tensor | None) -> Packing:
    ids, embeds, mask = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    tokens = ids if embeds is None else embeds
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or tokens.shape[0] != 1:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else None
        raise ValueError(f"cu_seq_lens_q goes with all tokens in one row, (1, tokens), not with {shape}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ValueError("cu_seq_lens_q must be (sequences + 1,) integers")
    if keys is not None and keys is not cu_seqlens and not torch.equal(keys, cu_seqlens):
        raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q: an encoder's queries are its keys")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("an attention_mask with zeros beside cu_seq_lens_q, which says all by itself: leave it out")
    borders = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(borders)]
    if not lengths or borders[0] != 0 or borders[-1] != tokens.shape[1] or min(lengths) < 1:
        raise ValueError(f"cu_seq_lens_q must rise from 0 to the {tokens.shape[1]} tokens, and is {borders}")
    return Packing.from_lengths(lengths, tokens.device).flat()


def to_rectangle(arguments: Mapping[str, Any], packing: Packing, padding_id: int, labels: bool) -> tuple[dict, Packing]:
    """The arguments of a flattened call, padded on the right, and their packing. labels: whether those are by token."""
    padded = Packing.from_lengths(packing.lengths, packing.cu_seqlens.device)
    fill = {"input_ids": padding_id} | ({"labels": _IGNORED_LABEL} if labels else {})
    changed = {
        name: padded.pad(arguments[name][0], fill.get(name, 0))
        for name in (*_BY_TOKEN, *fill)
        if isinstance(arguments.get(name), Tensor)
    }
    for name in _ANSWERS:
        if isinstance(answers := arguments.get(name), Tensor):
            # transformers ignores what lies outside of the rectangle, and so what lies outside of its sequence.
            inside = answers < padded.cu_seqlens.diff().view(-1, *[1] * (answers.dim() - 1))
            changed[name] = answers.masked_fill(~inside, padded.seq_len)
    ones = torch.ones(padded.tokens, dtype=torch.int64, device=packing.cu_seqlens.device)
    return {**arguments, **changed, "attention_mask": padded.pad(ones)}, padded
