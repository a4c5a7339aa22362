"""Texts to ask a model about, cut into what it takes, and its answers to them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bertfast.architectures import head_of
from bertfast.checkpoint import PretrainedModel
from bertfast.patching import backbones, root_of
from bertfast.runtime.answers import Answer, Kind

_LABELS = ("labels", "label", "next_sentence_label", "start_positions", "end_positions", "loss")
# Of a word's scores as many are kept, evenly spread, to compare: all of them would be gigabytes.
_COLUMNS = 256
Answers = dict[str, Answer]


class Questions:
    """The texts, or ready batches, for one model. See `bertfast.quantize`, which documents the arguments."""

    def __init__(self, model: Any, texts: Iterable, tokenizer: Any, max_length: int | None, batch_size: int) -> None:
        self._root, self._is_native = root_of(model), isinstance(model, PretrainedModel)
        self._encodes, pairs = _is(model, "SentenceTransformer"), _is(model, "CrossEncoder")
        self._carries_tokenizer = self._encodes or pairs
        self._model = model if self._encodes else model.model if pairs else self._root
        self._by_token = (head_of(type(self._model)) or (None, None))[1] == "tokens"
        self.batch_size, self.truncated = batch_size, 0
        self._texts = _checked(texts)
        self._own = self._encodes and not isinstance(self._texts[0], Mapping)
        if isinstance(self._texts[0], Mapping):
            if tokenizer is not None or max_length is not None:
                raise ValueError("tokenizer and max_length are for texts, and these are ready batches: leave them out")
            self._batches = [self._checked_batch(i, batch) for i, batch in enumerate(self._texts)]
        else:
            self._cut(model, tokenizer, max_length)

    def __len__(self) -> int:
        return len(self._texts) if self._own else sum(_rows(batch) for batch in self._batches)

    def first(self, n: int) -> "Questions":
        """The same with about n of the texts, spread over all."""
        step = max(len(self) // n, 1)
        fewer = object.__new__(Questions)
        fewer.__dict__.update(self.__dict__)
        if self._own:
            fewer._texts = self._texts[::step]
        else:
            fewer._batches = self._batches[:: max(len(self._batches) // max(n // self.batch_size, 1), 1)]
            fewer._order = None
        return fewer

    def ask(self) -> Answers:
        """Every output of the model for every text, in the order of the texts."""
        if self._own:
            found = self._model.encode(
                self._texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
            )
            return {"embedding": Answer("embedding", list(found.float().cpu()))}
        kinds: dict[str, Kind] = {}
        values: dict[str, list[Tensor]] = defaultdict(list)
        choices: dict[str, list[Tensor]] = defaultdict(list)
        for batch in self._batches:
            for name, kind, rows, chosen in self._outputs(batch):
                kinds[name] = kind
                values[name] += rows
                choices[name] += chosen
        return {n: Answer(kind, self._in_order(values[n]), self._in_order(choices[n])) for n, kind in kinds.items()}

    def _in_order(self, items: list) -> list:
        order = self._order
        return items if order is None or not items else [items[i] for i in order]

    # Where texts are cut into batches of about the same length, the place in them of each text.
    _order: list[int] | None = None

    def _cut(self, model: Any, tokenizer: Any, max_length: int | None) -> None:
        own = model.tokenizer if self._carries_tokenizer else None
        if own is not None and tokenizer is not None:
            raise ValueError(f"a {type(model).__name__} has a tokenizer: leave out tokenizer")
        tokenizer = own or tokenizer
        if tokenizer is None:
            raise ValueError("texts need a tokenizer: give the model's as tokenizer=, or batches that are ready")
        if not callable(tokenizer):
            raise TypeError(
                f"tokenizer must be one of transformers', which are called, not a {type(tokenizer).__name__}"
            )
        if "MultipleChoice" in type(self._model).__name__:
            raise ValueError("multiple choice takes batches of (batch, choices, seq_len) that are ready, not texts")
        if self._encodes and isinstance(self._texts[0], tuple):
            raise ValueError("a SentenceTransformer embeds single texts, not pairs")
        if self._encodes and max_length is not None:
            raise ValueError("a SentenceTransformer cuts texts itself: set its max_seq_length and leave out max_length")
        limit = min(self._limits(model, tokenizer))
        if max_length is not None and not 1 <= max_length <= limit:
            raise ValueError(f"max_length must be between 1 and the {limit:.0f} tokens that the model takes")
        limit = max_length or limit
        columns = tuple(zip(*self._texts, strict=True)) if isinstance(self._texts[0], tuple) else (self._texts,)
        cut = [list(column) for column in columns]
        lengths = [len(ids) for ids in tokenizer(*cut, truncation=False, verbose=False)["input_ids"]]
        self.truncated = sum(length > limit for length in lengths)
        if self._own:
            return
        features = tokenizer(*cut, truncation=True, max_length=int(limit))
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        self._order = [0] * len(by_length)
        for place, i in enumerate(by_length):
            self._order[i] = place
        self._batches = []
        for start in range(0, len(by_length), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            few = {name: [column[i] for i in rows] for name, column in features.items()}
            self._batches.append(dict(tokenizer.pad(few, return_tensors="pt")))

    def _limits(self, model: Any, tokenizer: Any) -> Iterator[float]:
        yield float(getattr(tokenizer, "model_max_length", None) or "inf")
        if self._carries_tokenizer:
            # Cross-encoders had `max_length` alone before sentence-transformers 6.
            limit = getattr(model, "max_seq_length" if hasattr(model, "max_seq_length") else "max_length", None)
            yield float(limit or "inf")
        for _, backbone, family in backbones(self._root):
            config = backbone.config
            yield config.max_position_embeddings - (family.positions == "running") * (config.pad_token_id + 1)
        if self._is_native:
            yield model.config.max_position_embeddings

    def _checked_batch(self, number: int, batch: Any) -> dict[str, Any]:
        """The batch without labels. TypeError / ValueError where it is not a rectangle of tensors."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch {number} is a {type(batch).__name__} and the first a mapping: give all of one kind")
        batch = {name: value for name, value in batch.items() if name not in _LABELS}
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() < 2 or not ids.numel():
            raise ValueError(f"batch {number} has no input_ids of (batch, seq_len)")
        if "cu_seq_lens_q" in batch:
            raise ValueError(f"batch {number} is flattened: give rectangles of (batch, seq_len), padded")
        if (mask := batch.get("attention_mask")) is not None and not bool(mask.any()):
            raise ValueError(f"batch {number} has no token that attention_mask lets through")
        return batch

    def _outputs(self, batch: dict[str, Any]) -> Iterator[tuple[str, Kind, list[Tensor], list[Tensor]]]:
        if self._encodes:
            yield "embedding", "embedding", list(self._model(dict(batch))["sentence_embedding"].float()), []
            return
        out = self._model(**batch) if self._is_native else self._model(**batch, return_dict=True)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if (hidden := getattr(out, "last_hidden_state", None)) is not None:
            counts = valid.sum(1).clamp(min=1)[:, None]
            yield "mean of tokens", "embedding", list((hidden.float() * valid[..., None]).sum(1) / counts), []
            if getattr(out, "pooler_output", None) is not None:
                yield "pooler", "embedding", list(out.pooler_output.float()), []
            return
        for name in ("logits", "prediction_logits", "seq_relationship_logits", "start_logits", "end_logits"):
            logits = getattr(out, name, None)
            if logits is not None:
                yield name, *_told(name, logits.float(), valid, self._by_token)


def _told(name: str, logits: Tensor, valid: Tensor, by_token: bool) -> tuple[Kind, list[Tensor], list[Tensor]]:
    """What logits say of each row: (rows, choices), (rows, seq_len, choices) or, of positions, (rows, seq_len).

    by_token: whether there is one number a token.
    """
    if name in ("start_logits", "end_logits"):
        masked = logits.masked_fill(~valid, float("-inf"))
        return "choice", _valid(logits, valid), list(masked.argmax(-1, keepdim=True))
    if logits.dim() == 3:
        tokens, step = _valid(logits, valid), -(-logits.shape[2] // _COLUMNS)
        return "choice", [t[:, ::step].flatten() for t in tokens], [t.argmax(-1) for t in tokens]
    if by_token:
        tokens = _valid(logits, valid)
        return "choice", tokens, [(t > 0).long() for t in tokens]
    if logits.shape[-1] == 1:
        return "score", list(logits), []
    return "choice", list(logits), list(logits.argmax(-1, keepdim=True))


def _valid(logits: Tensor, valid: Tensor) -> list[Tensor]:
    return [row[ok] for row, ok in zip(logits, valid, strict=True)]


def _rows(batch: Mapping[str, Any]) -> int:
    return batch["input_ids"].shape[0]


def _is(model: Any, name: str) -> bool:
    """Whether it is such a model of sentence-transformers, which is not imported for the question."""
    return any(
        kind.__name__ == name and kind.__module__.startswith("sentence_transformers") for kind in type(model).__mro__
    )


def _checked(texts: Iterable) -> list:
    """A list of strings, of pairs of strings as tuples, or of something else, which has to be batches."""
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(
            f"texts must be a list of strings, of pairs of strings or of batches, not a {type(texts).__name__}"
        )
    found = list(texts)
    if not found:
        raise ValueError("texts is empty: give some hundred that are like those the model is for")
    first = found[0]
    if isinstance(first, str):
        fits: Callable[[Any], bool] = lambda t: isinstance(t, str)  # noqa: E731
    elif isinstance(first, Mapping):
        return found
    else:
        fits = _is_pair
    if wrong := [i for i, t in enumerate(found) if not fits(t)]:
        raise TypeError(
            f"texts must be strings, pairs of strings, or batches, all of one kind: number {wrong[0]} is "
            f"{found[wrong[0]]!r:.80}"
        )
    return [tuple(t) for t in found] if fits is _is_pair else found


def _is_pair(item: Any) -> bool:
    return (
        isinstance(item, Sequence)
        and not isinstance(item, str)
        and len(item) == 2
        and all(isinstance(t, str) for t in item)
    )
