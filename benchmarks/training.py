"""Steps of pre-training, masked language modelling and next sentences: forward, backward and AdamW, dropout on.

float32 steps compute in float32; bfloat16 and float16 ones under autocast on float32 weights, as people train.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.roofline import MASKED
from benchmarks.workloads import Batch

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def labelled(batch: Batch) -> Batch:
    """The batch with labels on 15 % of its valid tokens and on the first of each sequence, so that none is without.

    Every other sequence's second half follows its first.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)).to(ids.device) < MASKED
    drawn[:, 0] = True
    follows = torch.arange(len(ids), device=ids.device) % 2
    return batch | {"labels": torch.where(drawn & mask, ids, -100), "next_sentence_label": follows}


def step(model: Any, batch: Batch, precision: str) -> Callable[[], Tensor]:
    """A training step of the model on this batch, which returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> Tensor:
        loss = _loss(model, batch, precision)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return run


def _loss(model: Any, batch: Batch, precision: str) -> Tensor:
    with torch.autocast(batch["input_ids"].device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
        return model(**batch).loss


def gradients(model: Any, batch: Batch, precision: str = "float32") -> tuple[float, list[Tensor | None]]:
    """The loss without dropout and the gradient of every parameter; leaves the model in training mode, without them."""
    model.eval()
    loss = _loss(model, batch, precision)
    loss.backward()
    found = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    model.train()
    return loss.item(), found


def gold(stock: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[float, list[Tensor | None]]:
    """Loss and gradients of the stock model in this precision."""
    return gradients(copy.deepcopy(stock).to(batch["input_ids"].device, dtype), batch)


def errors(right: tuple[float, list[Tensor | None]], actual: tuple[float, list[Tensor | None]]) -> dict[str, float]:
    """max: of the loss. mean: of the gradients' elements. cosine: of all gradients as one vector.

    A parameter without a gradient has a gradient of zero.
    """
    dot = ours = theirs = total = 0.0
    count = 0
    for wanted, found in zip(right[1], actual[1], strict=True):
        if wanted is None and found is None:
            continue
        some = wanted if wanted is not None else found
        a = torch.zeros_like(some, dtype=torch.float64) if wanted is None else wanted.double()
        b = torch.zeros_like(some, dtype=torch.float64) if found is None else found.double()
        dot += float((a * b).sum())
        ours += float((a * a).sum())
        theirs += float((b * b).sum())
        total += float((a - b).abs().sum())
        count += a.numel()
    cosine = dot / max((ours * theirs) ** 0.5, 1e-300)
    return {"max": abs(right[0] - actual[0]), "mean": total / max(count, 1), "cosine": cosine}
