"""A model with a head for a task, run on features: without padding where `patch` can, with it where it cannot."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bertfast.errors import UnsupportedModelError
from bertfast.ops.loss import IGNORED
from bertfast.packing import PackedBatch
from bertfast.patching import explain, patch, unpatch
from bertfast.train.features import Feature

PRECISIONS = ("float32", "bfloat16")
_ANSWERS = ("start_positions", "end_positions")


class Runner:
    """Losses and logits of a transformers model with a head, which is patched here where that is possible.

    labels: what the head's labels are those of, "sequence", "token" or "span" (two positions of a sequence).
    padding_id: the padding token, for models that need padding. precision: "bfloat16" computes under autocast.
    padded: why batches are padded; None where they are not.
    """

    def __init__(self, model: nn.Module, labels: str, padding_id: int, precision: str = "float32") -> None:
        self.model = model
        self.labels = labels
        self.padding_id = padding_id
        self.precision = precision
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._tells_types_apart = getattr(model.config, "type_vocab_size", 0) > 1
        self.padded = self._patch()

    def _patch(self) -> str | None:
        """Patch the model and try a batch that never was padded; why that does not work, where it does not."""
        try:
            patch(self.model)
        except UnsupportedModelError as error:
            return str(error)
        try:
            with torch.no_grad(), self._autocast():
                self.model.eval()(PackedBatch.from_lists([[0, 0], [0]], device=self.device))
            [backbone] = explain(self.model).backbones
            reason = None if backbone.calls["packed"] else next(iter(backbone.reasons))
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            unpatch(self.model)
        return reason

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    def loss(self, features: Sequence[Feature]) -> Tensor:
        """The mean loss of a batch of features with labels, () float."""
        return self._call(features, [f.labels for f in features]).loss

    @torch.inference_mode()
    def logits(self, features: Sequence[Feature], batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
        """The logits of each feature with its place among them, the longest features first.

        float32, of "sequence" (labels,), of "token" (tokens, labels), of "span" (tokens, 2): starts and ends.
        """
        self.model.eval()
        order = sorted(range(len(features)), key=lambda i: -len(features[i].input_ids))
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            found = self._call([features[i] for i in places], None)
            lengths = [len(features[i].input_ids) for i in places]
            yield from zip(places, self._split(found, lengths), strict=True)

    def _split(self, found: Any, lengths: list[int]) -> list[np.ndarray]:
        """The logits of a batch, sequence by sequence, without padding."""
        logits = torch.stack((found.start_logits, found.end_logits), -1) if self.labels == "span" else found.logits
        logits = logits.float().cpu()
        if self.labels == "sequence":
            rows: Sequence[Tensor] = logits
        elif self.labels == "token" and self.padded is None:
            rows = logits[0].split(lengths)
        else:
            rows = [row[:n] for row, n in zip(logits, lengths, strict=True)]
        return [row.numpy() for row in rows]

    def _call(self, features: Sequence[Feature], labels: list | None) -> Any:
        ids = [f.input_ids for f in features]
        types = [self._types(f) for f in features] if self._takes_types else None
        answers = {}
        if self.labels == "span" and labels is not None:
            answers = dict(zip(_ANSWERS, torch.tensor(labels, device=self.device).unbind(1), strict=True))
            labels = None
        with self._autocast():
            if self.padded is None:
                batch = PackedBatch.from_lists(ids, types, labels, self.labels == "token", self.device)
                return self.model(batch, **answers)
            return self.model(**self._pad(ids, types, labels), **answers)

    def _types(self, feature: Feature) -> list[int]:
        """The types of its tokens; said even where all are 0, of which transformers 4 has no more than positions."""
        known = feature.token_type_ids if self._tells_types_apart else None
        return known or [0] * len(feature.input_ids)

    def _pad(self, ids: list[list[int]], types: list | None, labels: list | None) -> dict[str, Tensor]:
        """The arguments of the rectangle that holds these sequences, padded on the right."""

        def rectangle(lists: list, value: int) -> Tensor:
            return pad_sequence([torch.tensor(row) for row in lists], True, value).to(self.device)

        batch = {"input_ids": rectangle(ids, self.padding_id)}
        batch["attention_mask"] = rectangle([[1] * len(row) for row in ids], 0)
        if types is not None:
            batch["token_type_ids"] = rectangle(types, 0)
        if labels is not None and self.labels == "token":
            batch["labels"] = rectangle(labels, IGNORED)
        elif labels is not None:
            batch["labels"] = torch.tensor(labels, device=self.device)
        return batch
