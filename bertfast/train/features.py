"""What a task makes of a row for the model: token ids, labels, and where the tokens come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bertfast.errors import DataError


@dataclass(frozen=True)
class Feature:
    """One sequence that goes through the model, without padding.

    row: the row it was made of, by its place among the rows; long ones make several. labels: what the model's head
    wants of this sequence, None where it is not known. places: where each token comes from, in the task's own terms.
    """

    row: int
    input_ids: list[int]
    token_type_ids: list[int] | None = None
    labels: Any = None
    places: Any = None


def check_vocabulary(features: Sequence[Feature], model: nn.Module) -> None:
    """DataError where the tokenizer gives ids that the model has no word embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    highest = max((max(feature.input_ids) for feature in features), default=0)
    if highest >= rows:
        raise DataError(
            f"the tokenizer gives token {highest}, but the model has embeddings of {rows} tokens only: "
            "take the tokenizer that the model was trained with"
        )
