"""masked_lm_loss against the cross entropy of every token's scores."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import Case, Peer, element_size, normal, work
from benchmarks.roofline import MASKED
from benchmarks.workloads import VOCABULARY
from bertfast import ops, reference


def masked_lm_loss(
    tokens: int,
    hidden: int,
    dtype: str,
    direction: str,
    device: str,
    headline: bool = False,
    vocabulary: int = VOCABULARY,
) -> Case:
    """The sum of the losses of 15 % of the tokens, at least one, with BERT's vocabulary."""
    labelled = max(round(MASKED * tokens), 1)

    def make(g: torch.Generator) -> tuple:
        labels = torch.full((tokens,), -100, device=g.device)
        places = torch.randperm(tokens, generator=g, device=g.device)[:labelled]
        labels[places] = torch.randint(vocabulary, (labelled,), generator=g, device=g.device)
        weight = normal(g, vocabulary, hidden, dtype=dtype, scale=hidden**-0.5)
        return normal(g, tokens, hidden, dtype=dtype), labels, weight, normal(g, vocabulary, dtype=dtype)

    def ours(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.masked_lm_loss(x, labels, weight, bias, reduction="sum").loss

    def every_token(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias).float(), labels, reduction="sum")

    # Read the labelled rows and the decoder; backward: both again, write dx and the decoder's gradient.
    rows, decoder = labelled * hidden, vocabulary * (hidden + 1)
    elements = work(direction, rows + decoder, rows + tokens * hidden + 2 * decoder)
    return Case(
        op="masked_lm_loss",
        shape=f"{labelled} of {tokens}x{vocabulary}x{hidden}",
        dtype=dtype,
        direction=direction,
        device=device,
        make=make,
        ours=ours,
        gold=reference.masked_lm_loss,
        plain=every_token,
        peers={"eager": Peer(every_token)},
        flops=work(direction, 2.0, 4.0) * labelled * vocabulary * hidden,
        nbytes=elements * element_size(dtype),
        compiled=every_token,
        headline=headline,
    )
