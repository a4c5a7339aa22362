"""What a model answers to texts, and how far two of its answers are from one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["embedding", "choice", "score"]


class Answer(NamedTuple):
    """One of a model's outputs, for each text.

    kind: "embedding", a vector; "choice", which of some numbers is the largest, for the text or for each of its tokens;
        "score", one number, which ranks texts.
    values: one float32 vector a text. choices: for each text the places of the largest, (tokens,) or (1,), of "choice".
    """

    kind: Kind
    values: Sequence[Tensor]
    choices: Sequence[Tensor] = ()

    def errors(self, other: "Answer") -> Tensor:
        """|b - a| / |a| of each text, (texts,) float64; 0 where both are 0."""
        found = []
        for a, b in zip(self.values, other.values, strict=True):
            error = torch.linalg.vector_norm(b.double() - a.double())
            found.append(error / torch.linalg.vector_norm(a.double()) if error != 0 else error)
        return torch.stack(found)


@dataclass(frozen=True)
class Agreement:
    """How one output of a model agrees with what it was before.

    cosine, worst_cosine, worst_text: of an embedding: mean and smallest cosine, and the number of the text that has it.
    agreement: of choices the share that is the same; of scores the share of pairs of texts in the same order.
    changed_texts: the numbers of the texts of which a choice has changed.
    largest_difference: of any number of the output.
    """

    output: str
    kind: Kind
    largest_difference: float
    cosine: float | None = None
    worst_cosine: float | None = None
    worst_text: int | None = None
    agreement: float | None = None
    changed_texts: tuple[int, ...] = ()

    @classmethod
    def of(cls, output: str, before: Answer, after: Answer) -> "Agreement":
        """Of the same texts. What is no number agrees with nothing."""
        pairs = list(zip(before.values, after.values, strict=True))
        largest = torch.cat([(b - a).abs() for a, b in pairs]).amax().item()  # a NaN if there is one
        if before.kind == "embedding":
            cosines = torch.stack([_cosine(a.double(), b.double()) for a, b in pairs])
            worst = int(cosines.argmin())
            return cls(output, "embedding", largest, cosines.mean().item(), cosines[worst].item(), worst)
        if before.kind == "score":
            a, b = (torch.cat([v.double() for v in answer.values]) for answer in (before, after))
            return cls(output, "score", largest, agreement=_same_order(a, b))
        same = [a == b for a, b in zip(before.choices, after.choices, strict=True)]
        changed = tuple(i for i, s in enumerate(same) if not bool(s.all()))
        return cls(output, "choice", largest, agreement=torch.cat(same).double().mean().item(), changed_texts=changed)

    def passes(self, min_cosine: float, min_worst_cosine: float, min_agreement: float) -> bool:
        """Whether these limits are kept."""
        if self.largest_difference != self.largest_difference:
            return False
        if self.agreement is not None:
            return self.agreement >= min_agreement
        return self.cosine >= min_cosine and self.worst_cosine >= min_worst_cosine

    def __str__(self) -> str:
        if self.kind == "embedding":
            told = f"cosine {self.cosine:.6f}, worst {self.worst_cosine:.6f} (text {self.worst_text})"
        elif self.kind == "choice":
            told = f"{self.agreement:.2%} of choices the same, {len(self.changed_texts)} texts changed"
        else:
            told = f"{self.agreement:.2%} of pairs in the same order"
        return f"{told}, largest difference {self.largest_difference:.2g}"


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 for two vectors that are the same, zeros too."""
    return a.new_ones(()) if torch.equal(a, b) else torch.cosine_similarity(a, b, dim=0)


def _same_order(a: Tensor, b: Tensor) -> float:
    """The share of pairs of elements that differ in `a` and stand in the same order in `b`; 1 where there are none."""
    differs, rows = 0, torch.arange(len(a))
    same = 0
    for i in range(len(a)):  # row by row: all pairs at once would take the square of the texts in memory
        order = torch.sign(a - a[i])
        counted = (order != 0) & (rows > i)
        differs += int(counted.sum())
        same += int((counted & (order == torch.sign(b - b[i]))).sum())
    return same / differs if differs else 1.0
