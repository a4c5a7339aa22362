"""attn_implementation="bertfast" on sequences in one row: what stock gives for each alone, or an error."""

from typing import Any

import pytest
import torch
from small_models import SETTINGS
from torch import Tensor, nn

from bertfast import attention_interface
from bertfast.attention_interface import attend, counts

# The interface works from 5.0 on, where some of the models named here have none, or not yet one of their own.
transformers = pytest.importorskip("transformers", minversion="5.23")

from interface_models import (  # noqa: E402, F401 (fixtures too)
    CLOSE,
    FAMILIES,
    LENGTHS,
    LLAMA,
    PAD,
    Plain,
    borders,
    build,
    call_of,
    check_row,
    fresh_counts,
    heads,
    mask_of,
    pair,
    reference,
    row_of,
    valid_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", [*FAMILIES, "Llama"])
def test_rows_of_sequences(name: str) -> None:
    ours, stock = pair(name + "Model", **(LLAMA if name == "Llama" else {}))
    check_row(ours, stock)
    packed = {"Llama": 0, "ModernBert": 2}.get(name, 2)
    assert counts["packed"] == packed, counts


@pytest.mark.usefixtures("reference")
def test_rows_of_causal_sequences_without_positions() -> None:
    """The borders hold where transformers' sdpa, which reads positions, does not know of them."""
    module, q = Plain(), heads(1, sum(LENGTHS)).double()
    module.is_causal = True
    actual, _ = attend(module, q, q, q, None, **borders())
    parts = [nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True) for x in q.split(LENGTHS, dim=2)]
    torch.testing.assert_close(actual, torch.cat(parts, dim=2).transpose(1, 2))
    assert counts == {"causal attention": 1}


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_neighbours_and_padding_change_nothing(name: str) -> None:
    model = build(name, dtype=torch.float32)
    row = row_of(model)
    with torch.no_grad():
        before = model(**row).last_hidden_state[0]
        start = sum(LENGTHS[:2])
        end = start + LENGTHS[2]
        row["input_ids"][0, start:end] = torch.randint(3, 53, (LENGTHS[2],))
        after = model(**row).last_hidden_state[0]
        assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])
        assert not torch.equal(before[start:end], after[start:end])
        call = call_of(mask_of("holes"))
        valid = valid_of(call)
        before = model(**call).last_hidden_state[valid]
        call["input_ids"] = call["input_ids"].masked_fill(~valid, 7)
        assert torch.equal(model(**call).last_hidden_state[valid], before)


@pytest.mark.usefixtures("reference")
def test_borders_are_read_once_and_again_when_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], attention_interface.read_borders
    monkeypatch.setattr(attention_interface, "read_borders", lambda *a: reads.append(a) or read(*a))
    model = build("BertModel")
    row = row_of(model)
    before = model(**row).last_hidden_state
    assert len(reads) == 1
    row["cu_seq_lens_q"][1] = row["cu_seq_lens_k"][1] = 3
    assert not torch.allclose(model(**row).last_hidden_state, before) and len(reads) == 2
    row["cu_seq_lens_k"][1] = 2
    with pytest.raises(ValueError, match="must be equal"):
        model(**row)


def _changed(**changes: Any) -> dict[str, Any]:
    return {**borders(), **changes}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (_changed(cu_seq_lens_k=torch.tensor([0, 5, 5, 11, 22], dtype=torch.int32)), "must be equal"),
        (_changed(cu_seq_lens_k=torch.tensor([0, 22], dtype=torch.int32)), "integers"),
        (_changed(cu_seq_lens_k=None), "have to come together"),
        (_changed(cu_seq_lens_q=None), "have to come together"),
        ({k: v.float() if isinstance(v, Tensor) else v for k, v in borders().items()}, "integers"),
        ({k: v[None] if isinstance(v, Tensor) else v for k, v in borders().items()}, "integers"),
        ({k: v.bool() if isinstance(v, Tensor) else v for k, v in borders().items()}, "integers"),
        ({k: v.tolist() if isinstance(v, Tensor) else v for k, v in borders().items()}, "integers, not a list"),
        ({k: v.flip(0) if isinstance(v, Tensor) else v for k, v in borders().items()}, "rise from 0"),
        (borders((4, 5)), "length of the only row"),
        (_changed(position_bias=torch.zeros(1, 4, 22, 22)), "position bias"),
    ],
)
def test_borders_that_are_none_are_refused(arguments: dict[str, Any], words: str) -> None:
    q = heads(1, sum(LENGTHS))
    with pytest.raises(ValueError, match=words):
        attend(Plain(), q, q, q, None, **arguments)


def test_borders_of_queries_and_of_other_keys_are_refused() -> None:
    rectangle, keys = heads(2, sum(LENGTHS) // 2), heads(1, 5)
    with pytest.raises(ValueError, match="2 rows"):
        attend(Plain(), rectangle, rectangle, rectangle, None, **borders())
    with pytest.raises(ValueError, match="5 keys"):
        attend(Plain(), heads(1, sum(LENGTHS)), keys, keys, None, **borders())


def test_empty_sequences() -> None:
    """Attention of nothing is nothing."""
    q, lengths = heads(1, 7), (0, 4, 0, 3)
    parts = [nn.functional.scaled_dot_product_attention(x, x, x) for x in q.split(lengths, dim=2)]
    expected = torch.cat(parts, dim=2).transpose(1, 2)
    for form in (q.double(), q):  # transformers' sdpa, and the op
        out, _ = attend(Plain(), form, form, form, None, **borders(lengths))
        torch.testing.assert_close(out.float(), expected)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_flattening_collator_end_to_end(name: str) -> None:
    """A masked-LM loss and its gradients, of a flattened batch and of the padded one."""
    ours, stock = pair(name + "ForMaskedLM")
    features = []
    for n in LENGTHS:
        ids = torch.randint(3, SETTINGS["vocab_size"], (n,)).tolist()
        features.append({"input_ids": ids, "labels": [i if at % 2 else -100 for at, i in enumerate(ids)]})
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    assert flat["cu_seq_lens_q"].tolist() == [0, 4, 5, 11, 22]

    def padded(key: str, value: int) -> Tensor:
        rows = [torch.tensor(f[key]) for f in features]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    expected = stock(input_ids=padded("input_ids", PAD), labels=padded("labels", -100), attention_mask=mask.long())
    actual = ours(**flat)
    torch.testing.assert_close(actual.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(actual.logits[0], expected.logits[mask], **CLOSE)
    for out in (actual, expected):
        out.loss.backward()
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **CLOSE)
    assert counts["packed"] == 2
