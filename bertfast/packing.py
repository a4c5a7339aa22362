"""Padded <-> packed: the only copy of this logic.

Packed means that the valid tokens of all sequences lie behind one another in one (tokens, ...) tensor, in the order
of the rectangle they came from, with `cu_seqlens` marking the borders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_MOST_TOKENS = 2**31 - 1  # what cu_seqlens can count
_INTEGERS = (int, torch.SymInt)


@dataclass(frozen=True)
class Packing:
    """How a (batch, seq_len) rectangle and its packed tokens map to each other.

    cu_seqlens: (batch + 1,) int32, the borders of the sequences in the packed tensor.
    indices: (tokens,) int64, where each packed token stands in the flattened rectangle; None where the rectangle has
        no padding, so that packing is a view.
    batch, seq_len: the rectangle. A batch that never was padded may call itself one row of all tokens, (1, tokens).
    lengths: valid tokens of each sequence, on the host.
    max_seqlen: the largest of them.
    order: (batch,) int32, longest sequences first, in which a GPU begins with them; None where it does not matter.
    """

    cu_seqlens: Tensor
    indices: Tensor | None
    batch: int
    seq_len: int
    lengths: tuple[int, ...]
    max_seqlen: int
    order: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Packing":
        """The packing of a (batch, seq_len) mask, 1 (or True) at valid tokens, 0 at padding: right, left, holes, any.

        Waits for the device once. Raises ValueError / TypeError for another shape, other values, or a dtype that is not
        bool, integer or floating.
        """
        check_mask(mask)
        batch, seq_len = mask.shape
        if mask.device.type == "cpu" and bool((mask == 1).all()):
            return cls.full(batch, seq_len)  # two operations instead of six, for the smallest batches
        valid = mask if mask.dtype == torch.bool else mask != 0
        counts = valid.sum(1)
        *lengths, strange = torch.cat((counts, (mask != valid).sum()[None])).tolist()
        if strange:
            raise ValueError(
                f"attention_mask holds {strange} values that are neither 0 nor 1: a two-dimensional mask says which "
                "tokens are valid; additive masks are four-dimensional"
            )
        tokens = sum(lengths)
        if tokens == batch * seq_len:
            return cls.full(batch, seq_len, mask.device)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=mask.device)
        torch.cumsum(counts, 0, out=cu_seqlens[1:])
        indices = valid.flatten().nonzero().flatten()
        order = None if mask.device.type == "cpu" else counts.argsort(descending=True).int()
        return cls(cu_seqlens, indices, batch, seq_len, tuple(lengths), max(lengths), order)

    @classmethod
    def full(cls, batch: int, seq_len: int, device: torch.device | str = "cpu") -> "Packing":
        """The packing of a rectangle without padding. Raises ValueError / TypeError for sizes that are none."""
        if not isinstance(batch, _INTEGERS) or not isinstance(seq_len, _INTEGERS):
            raise TypeError(f"batch and seq_len must be integers, not {batch!r} and {seq_len!r}")
        known = isinstance(batch, int) and isinstance(seq_len, int)  # and no symbols of a trace, which would be bound
        if known and (batch < 0 or seq_len < 0 or batch * seq_len > _MOST_TOKENS):
            raise ValueError(f"({batch}, {seq_len}) is no rectangle of at most 2^31 - 1 tokens")
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seq_len
        return cls(cu_seqlens, None, batch, seq_len, (seq_len,) * batch, seq_len if batch else 0)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Packing":
        """The packing of sequences of these lengths; its rectangle is right-padded to the longest."""
        host = _integers([0, *lengths], "lengths")
        if (host < 0).any() or host.sum() > _MOST_TOKENS:
            raise ValueError(f"lengths must not be negative, nor more than 2^31 - 1 in all: {list(lengths)}")
        seq_len, batch = max(lengths, default=0), len(lengths)
        if all(n == seq_len for n in lengths):
            return cls.full(batch, seq_len, device)
        valid = torch.arange(seq_len)[None] < host[1:, None]
        indices = valid.flatten().nonzero().flatten().to(device)
        order = host[1:].argsort(descending=True).int().to(device)
        return cls(host.cumsum(0).int().to(device), indices, batch, seq_len, tuple(lengths), seq_len, order)

    def flat(self) -> "Packing":
        """The same sequences, with all valid tokens in one row, (1, tokens), for a rectangle."""
        return replace(self, indices=None, batch=1, seq_len=self.tokens)

    @property
    def is_flat(self) -> bool:
        """Whether several sequences, or none, stand in the one row of the rectangle."""
        return len(self.lengths) != self.batch

    @property
    def tokens(self) -> int:
        """How many valid tokens there are."""
        return sum(self.lengths)

    def pack(self, rectangle: Tensor) -> Tensor:
        """(batch, seq_len, ...) to (tokens, ...); a view where there is no padding."""
        check_dense("the rectangle", rectangle, self.cu_seqlens.device)
        if rectangle.shape[:2] != (self.batch, self.seq_len):
            raise ValueError(f"expected ({self.batch}, {self.seq_len}, ...), got a tensor of {tuple(rectangle.shape)}")
        flat = rectangle.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def pad(self, packed: Tensor, value: float = 0.0) -> Tensor:
        """(tokens, ...) to (batch, seq_len, ...) with `value` in the padding; a view where there is none."""
        check_dense("packed", packed, self.cu_seqlens.device)
        if packed.shape[:1] != (self.tokens,):
            raise ValueError(f"expected ({self.tokens}, ...), got a tensor of {tuple(packed.shape)}")
        shape = (self.batch, self.seq_len, *packed.shape[1:])
        if self.indices is None:
            return packed.view(shape)
        flat = packed.new_full((self.batch * self.seq_len, *packed.shape[1:]), value)
        return flat.index_copy_(0, self.indices, packed).view(shape)

    def position_ids(self) -> Tensor:
        """The column of each token in the rectangle, (tokens,) int64: BERT's positions count padding."""
        if self.is_flat:
            starts = self.cu_seqlens[:-1].long().repeat_interleave(self.cu_seqlens.diff(), output_size=self.tokens)
            return torch.arange(self.tokens, device=starts.device) - starts
        if self.indices is not None and self.seq_len:
            return self.indices % self.seq_len
        return torch.arange(self.seq_len, device=self.cu_seqlens.device).repeat(self.batch)

    def running_counts(self, counted: Tensor) -> Tensor:
        """For each token the number of those in its sequence up to itself that are `counted`; 0 for the others.

        counted: (batch, seq_len) bool, of the whole rectangle, padding too. Returns (tokens,) int64. RoBERTa's
        positions are such counts.
        """
        if not self.is_flat:
            return self.pack(counted.cumsum(1) * counted)
        counted = counted.flatten()
        sums = counted.cumsum(0)
        before = torch.cat((sums.new_zeros(1), sums))[self.cu_seqlens[:-1].long()]
        return (sums - before.repeat_interleave(self.cu_seqlens.diff(), output_size=self.tokens)) * counted


def check_dense(name: str, tensor: Tensor, device: torch.device | None = None) -> None:
    """TypeError unless this is a dense tensor; ValueError where it is on another device."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a dense tensor, not a {kind}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the packing on {device}: move one of them with .to()")


def check_mask(mask: Tensor) -> None:
    """Raise unless the mask is a (batch, seq_len) tensor of numbers."""
    check_dense("attention_mask", mask)
    if mask.is_meta:
        raise ValueError("attention_mask is on meta, where tensors have no values")
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must be (batch, seq_len), not of shape {tuple(mask.shape)}")
    if mask.dtype.is_complex:
        raise TypeError(f"attention_mask must be bool, integer or floating, not {mask.dtype}")


def has_holes(mask: Tensor) -> bool:
    """Whether padding stands between valid tokens of a sequence in a (batch, seq_len) mask. Waits for the device."""
    valid = mask != 0
    begins = valid[:, 1:] & ~valid[:, :-1]
    return bool((begins.sum(1) + valid[:, 0] > 1).any())


@dataclass(frozen=True)
class PackedBatch:
    """A batch that never was padded: what the model takes in place of `input_ids` and `attention_mask`.

    input_ids, position_ids: (tokens,) int64 of all sequences behind one another. token_type_ids: the same, or None
    for 0 everywhere. labels: whatever the head wants, or None: (tokens,) for heads that label tokens, (sequences, ...)
    for heads that label sequences; token_labels: which of them. packing: the borders.
    """

    input_ids: Tensor
    position_ids: Tensor
    packing: Packing
    token_type_ids: Tensor | None = None
    labels: Tensor | None = None
    token_labels: bool = False

    @classmethod
    def from_lists(
        cls,
        input_ids: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]] | None = None,
        labels: Sequence | None = None,
        token_labels: bool = False,
        device: torch.device | str = "cpu",
    ) -> "PackedBatch":
        """The packed batch of token lists, one list a sequence, as a tokenizer gives them without padding.

        labels: one label (a number or a list of numbers) a sequence; with token_labels, a list of as many labels as
        tokens a sequence. Raises ValueError where the lists do not fit one another.
        """
        lengths = [len(ids) for ids in input_ids]
        if token_type_ids is not None and [len(ids) for ids in token_type_ids] != lengths:
            raise ValueError("token_type_ids must have the lengths of input_ids")
        packing = Packing.from_lengths(lengths, device)
        positions = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64)
        return cls(
            _concatenate(input_ids, "input_ids").to(device),
            positions.to(device),
            packing,
            None if token_type_ids is None else _concatenate(token_type_ids, "token_type_ids").to(device),
            None if labels is None else _labels(labels, lengths, token_labels).to(device),
            token_labels,
        )

    def flattened(self) -> dict[str, Any]:
        """The batch as keyword arguments of a patched model of transformers: all tokens in one row, and the borders.

        input_ids, token_type_ids and labels of tokens are (1, tokens), labels of sequences as they are; the rest is
        what transformers' DataCollatorWithFlattening calls the borders. Positions are left to the model, which knows
        how it counts them.
        """
        borders, longest = self.packing.cu_seqlens, self.packing.max_seqlen
        arguments = {"input_ids": self.input_ids[None]}
        if self.token_type_ids is not None:
            arguments["token_type_ids"] = self.token_type_ids[None]
        if self.labels is not None:
            arguments["labels"] = self.labels[None] if self.token_labels else self.labels
        lengths = {"max_length_q": longest, "max_length_k": longest}
        return {**arguments, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, **lengths}

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        p = self.packing
        packing = replace(p, cu_seqlens=move(p.cu_seqlens), indices=move(p.indices), order=move(p.order))
        moved = {k: move(getattr(self, k)) for k in ("input_ids", "position_ids", "token_type_ids", "labels")}
        return replace(self, packing=packing, **moved)


def _concatenate(lists: Sequence[Sequence[int]], name: str) -> Tensor:
    return _integers([i for ids in lists for i in ids], name)


def _integers(values: list[int], name: str) -> Tensor:
    """(n,) int64. ValueError for anything but integers, which torch.tensor would cut down to some."""
    try:
        found = torch.tensor(values) if values else torch.zeros(0, dtype=torch.int64)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be integers: {error}") from error
    if found.dtype is not torch.int64 or found.dim() != 1:
        raise ValueError(f"{name} must be integers, not {found.dtype} of shape {tuple(found.shape)}")
    return found


def _labels(labels: Sequence, lengths: list[int], token_labels: bool) -> Tensor:
    if len(labels) != len(lengths):
        raise ValueError(f"{len(labels)} labels for {len(lengths)} sequences")
    if not token_labels:
        try:
            return torch.tensor(labels)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"labels must be numbers, or lists of as many numbers: {error}") from error
    if wrong := [i for i, (row, n) in enumerate(zip(labels, lengths, strict=True)) if len(row) != n]:
        i = wrong[0]
        raise ValueError(f"sequence {i} has {lengths[i]} tokens and {len(labels[i])} labels")
    return _concatenate(labels, "labels")


@dataclass(frozen=True)
class PackingCollator:
    """Collates a tokenizer's features into a `PackedBatch`, for `torch.utils.data.DataLoader(collate_fn=...)`.

    A feature is a mapping with `input_ids` and, if there, `token_type_ids` and one of `labels` or `label`, lists
    without padding; `attention_mask`, if there, must be all ones. Anything else in it is an error, so that nothing is
    dropped in silence.

    token_labels: whether labels are those of the tokens (masked language modelling, named entities) rather than of the
        sequence.
    """

    token_labels: bool = False

    def __call__(self, features: Sequence[dict]) -> PackedBatch:
        known = {"input_ids", "token_type_ids", "attention_mask", "labels", "label"}
        if not features:
            raise ValueError("no features to collate")
        if strange := [f for f in features if not isinstance(f, Mapping)]:
            raise TypeError(f"features must be mappings, as tokenizers return them, not a {type(strange[0]).__name__}")
        if any(f.keys() != features[0].keys() or "input_ids" not in f for f in features):
            raise ValueError(f"features must all have input_ids, and the same keys: {[sorted(f) for f in features]}")
        if unknown := set().union(*features) - known:
            raise ValueError(f"features hold {sorted(unknown)}, which a PackedBatch has no place for: drop them first")
        if any(0 in f.get("attention_mask", ()) for f in features):
            raise ValueError("a feature is padded (its attention_mask has zeros): tokenize with padding=False")
        columns = {k: [f[k] for f in features] for k in known - {"attention_mask"} if k in features[0]}
        labels = columns.get("labels", columns.get("label"))
        return PackedBatch.from_lists(columns["input_ids"], columns.get("token_type_ids"), labels, self.token_labels)


class FlatteningCollator(PackingCollator):
    """As PackingCollator, with `PackedBatch.flattened` of the batch: what Trainer can hand to a patched model."""

    def __call__(self, features: Sequence[dict]) -> dict[str, Any]:
        return super().__call__(features).flattened()
