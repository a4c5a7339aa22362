"""How a patched model is compared with the stock one: outputs, gradients, and the path that it ran."""

import copy
from typing import Any

import torch
from stock_models import build, family_of, head_of
from torch import Tensor, nn

from bertfast.patching import explain, patch

TOLERANCE = 1e-11  # float64 rounding through two layers of large weights stays below 1e-13


def pair(name: str = "BertModel", *, padding: str = "exact", **settings: Any) -> tuple[Any, Any]:
    """A stock model and its patched copy."""
    stock = build(name, **settings)
    return stock, patch(copy.deepcopy(stock), padding=padding)


def visible(output: Any, mask: Tensor | None, *, everything: bool = False) -> dict[str, Tensor]:
    """The tensors of an output that have to agree: those of tokens at valid positions only, unless `everything`."""
    found = {}
    for key, value in output.items():
        if isinstance(value, Tensor):
            by_token = mask is not None and value.shape[:2] == mask.shape
            found[key] = value[mask.bool()] if by_token and not everything else value
    return found


def gradients(
    model: nn.Module, output: Any, mask: Tensor | None, *, without: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Gradients of every parameter for a random combination of all that is visible."""
    torch.manual_seed(2)
    seen = visible(output, mask)
    total = sum((v * torch.randn_like(v)).sum() for k, v in seen.items() if k not in without)
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """The same names, dtypes and shapes, and values up to rounding."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and actual[key].shape == value.shape, key
        error = (actual[key] - value).abs().max().item() if value.numel() else 0.0
        assert error <= tolerance * max(1.0, value.abs().max().item() if value.numel() else 1.0), f"{key}: {error:.3g}"


def assert_agree(patched: nn.Module, stock: nn.Module, call: dict, mask: Tensor | None, **how: Any) -> None:
    """Outputs and gradients of every parameter agree."""
    ours, theirs = patched(**call), stock(**call)
    assert type(ours) is type(theirs)
    assert_same(visible(ours, mask, **how), visible(theirs, mask, **how))
    ours, theirs = gradients(patched, ours, mask), gradients(stock, theirs, mask)
    assert len(theirs) >= len(list(stock.parameters())) - 2  # the pooler's, where nothing uses it
    assert_same(ours, theirs, 10 * TOLERANCE)


def ran(model: nn.Module) -> dict[str, int]:
    """How often each path ran, without those that did not."""
    return {kind: n for kind, n in explain(model).backbones[0].calls.items() if n}


def reasons(model: nn.Module) -> str:
    """Why calls, or parts of them, were not packed or not fused."""
    return "; ".join(explain(model).backbones[0].reasons)


def reads_first(name: str) -> bool:
    """Whether the model shows what stands at position 0 in another form than that token's hidden state."""
    head = head_of(name)
    if head == "Model":
        return name not in ("ElectraModel", "DistilBertModel")
    return head in ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction") or (
        name == "BertForPreTraining"
    )


def reads_all(name: str) -> bool:
    """Whether the head's loss reads the logits at padding positions."""
    return head_of(name) in ("ForQuestionAnswering", "LMHeadModel", "ForCausalLM")


def exact_path(name: str, form: str) -> str:
    """What padding="exact" promises to run for a mask of this form."""
    if form in ("none", "ones"):
        return "packed"
    holes = form == "holes" and family_of(name).prefix == "MPNet"  # whose bias goes by columns
    if form == "empty row" or reads_all(name) or (form == "left" and reads_first(name)) or holes:
        return "rectangle"
    return "packed"


def borders_of(mask: Tensor) -> list[tuple[int, int]]:
    """Where each sequence begins and ends among the valid tokens."""
    ends = mask.sum(1).cumsum(0).tolist()
    return list(zip([0, *ends], ends, strict=False))


def own_loss(name: str, expected: dict[str, Tensor], call: dict[str, Tensor], mask: Tensor) -> Tensor:
    """The loss that looks at valid tokens only, from stock's logits."""
    if head_of(name) == "ForQuestionAnswering":
        sides = []
        for side in ("start", "end"):
            logits = [expected[f"{side}_logits"][a:b] for a, b in borders_of(mask)]
            # The place of the answer among the valid tokens.
            right = [int(m[:i].sum()) for m, i in zip(mask, call[f"{side}_positions"].tolist(), strict=True)]
            sides.append(torch.stack([-x.log_softmax(0)[i] for x, i in zip(logits, right, strict=True)]).mean())
        return sum(sides) / 2
    losses = []
    for a, b in borders_of(mask):
        scores = expected["logits"][a:b][:-1].log_softmax(-1)
        labels = call["labels"][mask.bool()][a + 1 : b]
        losses.append(-scores.gather(1, labels[:, None]))
    return torch.cat(losses).mean()
