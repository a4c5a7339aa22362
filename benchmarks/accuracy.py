"""Whether an output is right: how far it is from the stock model's in a wide precision, on valid tokens alone."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.workloads import Batch

_GROUP = 16  # sequences that the wide model takes at a time
# Operations from which on float64 takes too long; float32 is still ten thousand times as exact as bfloat16.
_NARROWED = 1e12


class Limit(NamedTuple):
    """What is still called accurate: the largest absolute error, and the smallest cosine of two outputs."""

    max: float
    cosine: float


# float32: rounding alone makes 5e-6; TF32, a tanh for an erf or a mask that leaks make 1e-3 and more. Half precision:
# stock's own twelve layers are off by 0.1 in bfloat16. int8 is off by as much as the engines' makers found bearable, 1
# and more on real weights: what must hold is the direction.
LIMITS = {
    "float32": Limit(1e-4, 0.999999),
    "float16": Limit(0.1, 0.9999),
    "bfloat16": Limit(0.4, 0.999),
    "int8": Limit(float("inf"), 0.95),
}
# Of a training step: of the loss, which is about 10, and of all gradients as one vector. In float32 their cosine is off
# by 1e-12; a wrong scale in the attention of one small layer makes 1e-7 of that.
TRAINING_LIMITS = {
    "float32": Limit(1e-4, 0.99999999),
    "float16": Limit(0.05, 0.995),
    "bfloat16": Limit(0.1, 0.99),
}


def wide(flops: float) -> torch.dtype:
    """The precision in which so much work is done for comparison."""
    return torch.float64 if flops < _NARROWED else torch.float32


@torch.inference_mode()
def gold(stock: nn.Module, batches: Sequence[Batch], head: str, dtype: torch.dtype) -> list[Tensor]:
    """The stock model's outputs in this precision, in the shape that peers give them in.

    Sequences run with others of their own length only, so that nothing is ever padded. At padding stands zero.
    """
    device = batches[0]["input_ids"].device
    model = copy.deepcopy(stock).to(device, dtype)
    return [_gold(model, batch, head) for batch in batches]


def _gold(model: nn.Module, batch: Batch, head: str) -> Tensor:
    lengths = batch["attention_mask"].sum(1).tolist()
    rows: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        rows[length].append(row)
    out: Tensor | None = None
    for length, same in rows.items():
        for some in (same[i : i + _GROUP] for i in range(0, len(same), _GROUP)):
            result = model(**{name: tensor[some, :length] for name, tensor in batch.items()})
            part = result.logits if head else result.last_hidden_state
            if out is None:
                shape = (len(lengths), *([max(lengths)] if part.dim() == 3 else []), part.shape[-1])
                out = part.new_zeros(shape)
            if part.dim() == 3:
                out[some, :length] = part
            else:
                out[some] = part
    return out


def errors(right: Sequence[Tensor], actual: Iterable[Tensor], batches: Sequence[Batch]) -> dict[str, float]:
    """max and mean: of the absolute error on valid tokens. cosine: the worst of two sequences' mean over their tokens.

    One logit a sequence has no direction of its own: there the cosine is that of a batch's. What is not a number, or
    has another shape, is as wrong as can be.
    """
    largest, total, count, cosine = 0.0, 0.0, 0, 1.0
    for gold, output, batch in zip(right, actual, batches, strict=True):
        if gold.shape != output.shape:
            return {"max": float("inf"), "mean": float("inf"), "cosine": -1.0}
        a, b = gold.double(), output.detach().double()
        if a.dim() == 3:
            valid = batch["attention_mask"].bool()[..., None]
            a, b = a.where(valid, 0), b.where(valid, 0)
            values, pooled = int(valid.sum()) * a.shape[-1], (a.sum(1), b.sum(1))
        else:
            values, pooled = a.numel(), (a.reshape(1, -1), b.reshape(1, -1))
        difference = (a - b).abs().nan_to_num(torch.inf)
        largest = max(largest, difference.max().item())
        total += difference.sum().item()
        count += values
        cosine = min(cosine, torch.cosine_similarity(*pooled, dim=-1).nan_to_num(-1.0).min().item())
    return {"max": largest, "mean": total / count, "cosine": cosine}


def fault(found: dict[str, float], limit: Limit) -> str:
    """What is wrong with these errors, in a line; nothing where they are within the limit."""
    wrong = []
    if not found["max"] <= limit.max:  # which NaN is not
        wrong.append(f"the largest error is {found['max']:.2g}, more than {limit.max:g}")
    if not found["cosine"] >= limit.cosine:
        wrong.append(f"the cosine is {found['cosine']:.6f}, less than {limit.cosine:g}")
    return " and ".join(wrong)
