"""Batches that never were padded, as arguments of a model of transformers: all tokens in one row, and the borders.

The form is that of transformers' DataCollatorWithFlattening: ids are (1, tokens), `cu_seq_lens_q` says where sequences
begin. `patch` makes models take it, and `PackedBatch` objects too. Heads that compute token by token work on the one
row. Those that read whole sequences (the first token, a span) get a rectangle of hidden states, of ids and of labels,
which is made of what the encoder computed without padding.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bertfast.ops.loss import IGNORED
from bertfast.packing import PackedBatch, Packing

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
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
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("an attention_mask with zeros beside cu_seq_lens_q, which says all by itself: leave it out")
    packing = read_borders(cu_seqlens, cu_seqlens if keys is None else keys, tokens.device)
    check_row(packing, 1, tokens.shape[1], "tokens")
    # Attention of nothing is nothing, but heads and poolers read a first token.
    if not packing.tokens or 0 in packing.lengths:
        raise ValueError(f"cu_seq_lens_q of an empty sequence, which has no first token: {cu_seqlens.tolist()}")
    return packing


def read_borders(queries: Tensor, keys: Tensor, device: torch.device) -> Packing:
    """The packing, on `device`, of the sequences between cu_seq_lens_q and cu_seq_lens_k, (sequences + 1,), as one row.

    Waits for the device once. Sequences may be empty. Raises ValueError where the two are no borders, or differ.
    """
    if not all(_are_integers(borders) for borders in (queries, keys)) or queries.shape != keys.shape:
        given = " and ".join(_described(borders) for borders in (queries, keys))
        raise ValueError(f"cu_seq_lens_q and cu_seq_lens_k must be (sequences + 1,) integers, not {given}")
    borders, others = torch.stack((queries, keys.to(queries.device, queries.dtype))).tolist()
    if borders != others:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must be equal, as the queries of self attention are its keys: "
            f"{borders} and {others}"
        )
    lengths = [end - begin for begin, end in pairwise(borders)]
    if not borders or borders[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seq_lens must rise from 0, not be {borders}")
    return Packing.from_lengths(lengths, device).flat()


def check_row(packing: Packing, rows: int, length: int, what: str) -> None:
    """ValueError unless the borders' last is the length of the only row."""
    if (rows, length) != (1, packing.tokens):
        raise ValueError(
            f"cu_seq_lens end at {packing.tokens}, which has to be the length of the only row; there are {rows} rows "
            f"of {length} {what}"
        )


def _are_integers(borders: object) -> bool:
    return (
        isinstance(borders, Tensor)
        and borders.dim() == 1
        and not (borders.is_floating_point() or borders.is_complex() or borders.dtype == torch.bool)
    )


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def mixing(reason: str) -> ValueError:
    """The error of a flattened call that cannot run packed."""
    return ValueError(f"sequences in one row would mix in stock code, which has to run: {reason}")


def to_rectangle(arguments: Mapping[str, Any], packing: Packing, padding_id: int, labels: bool) -> tuple[dict, Packing]:
    """The arguments of a flattened call, padded on the right, and their packing. labels: whether those are by token."""
    padded = Packing.from_lengths(packing.lengths, packing.cu_seqlens.device)
    fill = {"input_ids": padding_id} | ({"labels": IGNORED} if labels else {})
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
