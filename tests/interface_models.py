"""What the tests of attn_implementation="bertfast" share: models on it and on sdpa, calls of them, how they agree."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from small_models import SETTINGS, draw_weights, make_mask
from torch import Tensor, nn

import bertfast
from bertfast.attention_interface import counts, register_attention

NAME = register_attention()
BATCH, SEQ_LEN, PAD = 3, 11, 1
LENGTHS = (4, 1, 6, 11)
FORMS = ("none", "ones", "right", "left", "holes", "empty row")
# Models of float64, whose two attentions round differently.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
MORE_THAN_PADDING = "a mask of more than padding"

LLAMA = {"num_key_value_heads": 2, "max_position_embeddings": 64}
_ROTARY = {"max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "Xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "NomicBert": _ROTARY,
    "Gte": _ROTARY,
    "EuroBert": _ROTARY,
    # Four layers, of which the first and the last see everything, and the others four tokens on each side.
    "ModernBert": {**_ROTARY, "num_hidden_layers": 4, "local_attention": 8},
}


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    counts.clear()


@pytest.fixture
def reference() -> Iterator[None]:
    """The packed op in float64, for which there are no kernels."""
    with bertfast.backend.use("reference"):
        yield


def build(name: str, attention: str = NAME, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A small model with large weights, the same for every attention, in eval mode. name: as in "BertModel"."""
    family = next((f for f in FAMILIES if name.startswith(f)), None)
    wanted = {**SETTINGS, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
    wanted |= {"cls_token_id": 0, "sep_token_id": 2} if family == "ModernBert" else {}
    wanted |= FAMILIES.get(family or "", {}) | settings
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**wanted, attn_implementation=attention))
    draw_weights(model)
    return model.to(dtype).eval()


def pair(name: str, **settings: Any) -> tuple[Any, Any]:
    """The same model with our attention and with transformers' sdpa."""
    return build(name, **settings), build(name, "sdpa", **settings)


def mask_of(form: str) -> Tensor | None:
    return torch.ones(BATCH, SEQ_LEN, dtype=torch.int64) if form == "ones" else make_mask(form, BATCH, SEQ_LEN)


def call_of(mask: Tensor | None) -> dict[str, Tensor]:
    ids = torch.randint(3, SETTINGS["vocab_size"], (BATCH, SEQ_LEN))
    return (
        {"input_ids": ids} if mask is None else {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    )


def valid_of(call: dict[str, Tensor]) -> Tensor:
    return call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()


def check_agreement(ours: nn.Module, stock: nn.Module, call: dict[str, Tensor]) -> None:
    """Assert that the outputs on valid tokens agree, and the gradients of a function of them."""
    valid, results = valid_of(call), []
    for model in (ours, stock):
        model.zero_grad()
        out = model(**call).last_hidden_state[valid]
        torch.manual_seed(2)
        (out * torch.randn_like(out)).sum().backward()
        results.append({"": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    actual, expected = results
    assert actual.keys() == expected.keys() and len(expected) > 10
    for name, gold in expected.items():
        scale = gold.abs().max().clamp(min=1.0)
        torch.testing.assert_close(actual[name] / scale, gold / scale, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that call the attention interface."""
    return (m for m in model.modules() if hasattr(m, "is_causal"))


class Plain(nn.Module):
    """Stands for a model's attention that is given one sequence."""

    is_causal = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> None: ...


def made(valid: Tensor, **arguments: Any) -> Tensor | None:
    """The mask of a bidirectional encoder."""
    config = transformers.BertConfig(attn_implementation=NAME)
    return transformers.masking_utils.create_bidirectional_mask(
        config, torch.empty(*valid.shape, 1), valid, **arguments
    )


def heads(batch: int = BATCH, tokens: int = SEQ_LEN, count: int = 4, size: int = 16) -> Tensor:
    """(batch, heads, tokens, head_size), strided as the models'."""
    return torch.randn(batch, tokens, count, size).transpose(1, 2)


def borders(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """The arguments that say where sequences begin, as DataCollatorWithFlattening gives them."""
    starts = list(itertools.accumulate(lengths, initial=0))
    q, k = (torch.tensor(starts, dtype=torch.int32) for _ in "qk")
    return {"cu_seq_lens_q": q, "cu_seq_lens_k": k, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def row_of(model: nn.Module) -> dict[str, Any]:
    """A batch of one row with all tokens of sequences of these lengths."""
    first = PAD + 1 if type(model).__name__.startswith(("Roberta", "Xmod")) else 0
    positions = torch.cat([torch.arange(n) + first for n in LENGTHS])[None]
    ids = torch.randint(3, SETTINGS["vocab_size"], (1, sum(LENGTHS)))
    return {"input_ids": ids, "position_ids": positions, **borders()}


def check_row(ours: nn.Module, stock: nn.Module) -> None:
    """Assert that a row of sequences gives what stock gives for each alone, and the gradients of their sum."""
    call = row_of(ours)
    actual = ours(**call).last_hidden_state[0]
    parts = call["input_ids"][0].split(LENGTHS)
    expected = torch.cat([stock(input_ids=part[None]).last_hidden_state[0] for part in parts])
    torch.testing.assert_close(actual, expected, **CLOSE)
    direction = torch.randn_like(actual)
    for model, out in ((ours, actual), (stock, expected)):
        model.zero_grad()
        (out * direction).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if q.grad is not None:
            scale = q.grad.abs().max().clamp(min=1.0)
            torch.testing.assert_close(p.grad / scale, q.grad / scale, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
