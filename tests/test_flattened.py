"""Batches that never were padded, in patched models: what the padded ones give, or an error, and never a mixture."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bertfast import PackedBatch, seams

transformers = pytest.importorskip("transformers")

from agreement import TOLERANCE, assert_agree, assert_same, borders_of, own_loss, pair, ran, reads_all, visible  # noqa: E402
from compatibility import note  # noqa: E402
from stock_models import CLASSES, FAMILIES, LEGACY, call_of, family_of, head_of, mask_of  # noqa: E402

BASES = tuple(family.classes[0] for family in FAMILIES.values())
NEW_ONLY = pytest.mark.skipif(LEGACY, reason="its stock models take no borders")


pytestmark = pytest.mark.usefixtures("one_thread")


def flat_call(name: str) -> tuple[dict, PackedBatch, dict, Tensor]:
    """A padded call, the same as a PackedBatch and as flattened arguments, and the mask."""
    mask = mask_of("right")
    call = call_of(name, mask)
    if head_of(name) == "ForQuestionAnswering":  # the second sequence has one token
        call |= {"start_positions": torch.tensor([0, 0, 2]), "end_positions": torch.tensor([4, 0, 3])}
    family = family_of(name)
    rows = [ids[: int(n)].tolist() for ids, n in zip(call["input_ids"], mask.sum(1), strict=True)]
    types = call.get("token_type_ids")
    if types is not None:
        types = [t[: int(n)].tolist() for t, n in zip(types, mask.sum(1), strict=True)]
    labels = call.get("labels")
    by_token = labels is not None and labels.shape == mask.shape
    if labels is not None:
        labels = labels[mask.bool()].tolist() if by_token else labels.tolist()
        labels = [labels[a:b] for a, b in borders_of(mask)] if by_token else labels
    batch = PackedBatch.from_lists(rows, types, labels, token_labels=by_token)
    others = {k: v for k, v in call.items() if k in ("start_positions", "end_positions", "next_sentence_label")}
    assert family.pad == call["input_ids"][1, -1]
    return call, batch, others, mask


@pytest.mark.parametrize("way", ["batch", "arguments", "packed batch by name"])
@pytest.mark.parametrize("name", [n for n in CLASSES if not n.endswith("ForMultipleChoice")])
def test_batches_that_never_were_padded(name: str, way: str) -> None:
    """They give what the padded batch gives where padding takes part in nothing."""
    stock, patched = pair(name)
    call, batch, others, mask = flat_call(name)
    if way == "arguments":
        ours = patched(**batch.flattened(), **others)
    else:
        ours = patched(batch, **others) if way == "batch" else patched(input_ids=batch, **others)
    expected = visible(stock(**call), mask)
    found = {k: v for k, v in ours.items() if isinstance(v, Tensor)}
    if reads_all(name):
        expected["loss"] = own_loss(name, expected, call, mask)
    if found["loss" if "loss" in found else "last_hidden_state"].dtype == torch.float32:  # of shifted labels, in stock
        assert abs(found.pop("loss") - expected.pop("loss")) < 1e-5
    for key, value in found.items():
        if value.shape[:2] == (1, batch.packing.tokens):
            found[key] = value[0]
        elif value.shape[:2] == mask.shape:
            found[key] = value[mask.bool()]
    assert_same(found, expected)
    torch.manual_seed(2)
    weights = {k: torch.randn_like(v) for k, v in expected.items()}
    grads = []
    for model, seen in ((patched, found), (stock, expected)):
        model.zero_grad()
        sum((seen[k] * w).sum() for k, w in weights.items()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert_same(*grads, 10 * TOLERANCE)
    assert ran(patched) == {"packed": 1}
    if way == "batch":
        note("batches that never were padded, labels included", name, "packed")


@pytest.mark.parametrize("name", BASES)
def test_words_as_vectors_in_one_row(name: str) -> None:
    """Vectors of words in place of ids, which tell no padding token from others."""
    if LEGACY and name == "DistilBertModel":
        pytest.skip("has no position_ids, and computes vectors' positions itself")
    stock, patched = pair(name)
    lengths, table = [4, 1, 6], stock.get_input_embeddings()
    rows = [table(torch.randint(5, 50, (1, n))).detach() for n in lengths]
    borders = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    ours = patched(inputs_embeds=torch.cat(rows, 1), cu_seq_lens_q=borders)
    theirs = [stock(inputs_embeds=row) for row in rows]
    assert_same({"h": ours[0]}, {"h": torch.cat([t[0] for t in theirs], 1)})
    if "pooler_output" in ours:
        assert_same({"p": ours[1]}, {"p": torch.cat([t[1] for t in theirs])})
    assert ran(patched) == {"packed": 1}


def test_question_answering_beyond_the_shorter_sequence() -> None:
    """In the padding of the rectangle no answer begins, and one that is said to is ignored, as behind the rectangle."""
    _, patched = pair("BertForQuestionAnswering")
    _, batch, others, mask = flat_call("BertForQuestionAnswering")
    logits = patched(batch).start_logits
    losses = [
        patched(batch, **{k: v.index_fill(0, torch.tensor([1]), outside) for k, v in others.items()}).loss
        for outside in (1, 10, 11, 500)
    ]
    assert all(torch.equal(loss, losses[0]) for loss in losses) and losses[0].isfinite()
    assert (logits[mask == 0] == torch.finfo(torch.float64).min).all() and (logits[mask == 1].abs() < 1e6).all()


@NEW_ONLY
def test_transformers_own_collator() -> None:
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    stock, patched = pair("BertForMaskedLM")
    call, batch, _, mask = flat_call("BertForMaskedLM")
    rows = [{"input_ids": i.tolist()} for i in batch.input_ids.split(batch.packing.lengths)]
    ours = patched(**{k: v for k, v in collator(rows).items() if k != "labels"})
    theirs = stock(call["input_ids"], attention_mask=mask).logits[mask.bool()]
    assert_same({"l": ours.logits[0]}, {"l": theirs})


BAD_BATCHES: dict[str, Callable[[dict], dict]] = {
    "keys differ": lambda c: c | {"cu_seq_lens_k": c["cu_seq_lens_q"] + 1},
    "do not end": lambda c: c | {"cu_seq_lens_q": c["cu_seq_lens_q"][:-1], "cu_seq_lens_k": None},
    "fall": lambda c: c | {"cu_seq_lens_q": c["cu_seq_lens_q"][[0, 2, 1, 3]], "cu_seq_lens_k": None},
    "an empty one": lambda c: c | {"cu_seq_lens_q": c["cu_seq_lens_q"][[0, 1, 1, 2, 3]], "cu_seq_lens_k": None},
    "not integers": lambda c: c | {"cu_seq_lens_q": c["cu_seq_lens_q"].float(), "cu_seq_lens_k": None},
    "a list": lambda c: c | {"cu_seq_lens_q": c["cu_seq_lens_q"].tolist(), "cu_seq_lens_k": None},
    "keys alone": lambda c: c | {"cu_seq_lens_q": None},
    "two rows": lambda c: c | {"input_ids": c["input_ids"].expand(2, -1), "token_type_ids": None},
    "a mask": lambda c: c | {"attention_mask": torch.zeros_like(c["input_ids"])},
    "attentions wanted": lambda c: c | {"output_attentions": True},
}


@pytest.mark.parametrize("fault", BAD_BATCHES)
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_bad_borders_are_refused(name: str, fault: str) -> None:
    stock, patched = pair(name)
    call, batch, _, mask = flat_call(name)
    with pytest.raises(ValueError, match=r"cu_seq_lens|one row"):
        patched(**BAD_BATCHES[fault](batch.flattened()))
    assert not seams.calls.frames and not seams.calls.heads
    assert_agree(patched, stock, call, mask)


def test_packed_batches_alone_and_rectangles_for_choices() -> None:
    _, patched = pair("BertForMaskedLM")
    _, batch, _, mask = flat_call("BertForMaskedLM")
    with pytest.raises(ValueError, match="attention_mask given beside a PackedBatch"):
        patched(batch, attention_mask=mask)
    with pytest.raises(ValueError, match="an empty sequence"):
        patched(PackedBatch.from_lists([[1, 2], []]))
    with pytest.raises(ValueError, match="one row"):
        patched.bert.encoder.layer[0].attention.self.query.bias = None
        patched(batch)
    _, choices = pair("BertForMultipleChoice")
    with pytest.raises(ValueError, match="multiple choice"):
        choices(flat_call("BertForTokenClassification")[1])


class Wrapped(nn.Module):
    """Like what shards or compiles a module: it stands in its place."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)


def _another_base(model: nn.Module, stock: nn.Module) -> None:
    setattr(model, stock.base_model_prefix, stock.base_model)


def _wrapped_base(model: nn.Module, stock: nn.Module) -> None:
    setattr(model, model.base_model_prefix, Wrapped(model.base_model))


def _compiled_base(model: nn.Module, stock: nn.Module) -> None:
    model.base_model.compile(backend="eager")


def _compiled_encoder(model: nn.Module, stock: nn.Module) -> None:
    _encoder(model).compile(backend="eager")


def _own_encoder(model: nn.Module, stock: nn.Module) -> None:
    _encoder(model).forward = _encoder(model)._stock


def _encoder(model: nn.Module) -> nn.Module:
    return getattr(model.base_model, model._bertfast.family.encoder_place)


@pytest.mark.parametrize(
    "change",
    [_another_base, _wrapped_base, _compiled_base, _compiled_encoder, _own_encoder],
    ids=lambda change: change.__name__.strip("_"),
)
@pytest.mark.parametrize("name", ["BertForTokenClassification", "DistilBertForMaskedLM"])
def test_sequences_never_mix_in_stock_code(name: str, change: Callable[[nn.Module, nn.Module], None]) -> None:
    """Changes after patching that keep the encoder from running packed: padded batches run, others are refused."""
    stock, patched = pair(name)
    call, batch, _, mask = flat_call(name)
    change(patched, copy.deepcopy(stock))
    with torch.no_grad():
        assert_same(visible(patched(**call), mask), visible(stock(**call), mask))
        for given in ({"input_ids": batch}, batch.flattened()):
            with pytest.raises(ValueError, match=r"mix in stock code, which has to run: the .* after patching"):
                patched(**given)
    assert not seams.calls.frames and not seams.calls.heads
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification", "MPNetModel"])
def test_compiled_calls_are_refused(name: str) -> None:
    """A tracer sees stock code, whose sdpa ignores borders."""
    _, patched = pair(name)
    with torch.no_grad(), pytest.raises(ValueError, match="one row would mix in stock code, which has to run"):
        torch.compile(patched, backend="eager")(**flat_call(name)[1].flattened())
    torch._dynamo.reset()


@NEW_ONLY
@pytest.mark.parametrize("name", [base for base in BASES if base != "MPNetModel"])  # which drops what it does not know
def test_borders_past_the_hooks_are_refused(name: str) -> None:
    _, patched = pair(name)
    with pytest.raises(ValueError, match="one row would mix in stock code, which has to run"):
        patched.forward(**flat_call(name)[1].flattened())


def test_a_pooler_that_sees_one_row_is_refused() -> None:
    stock, patched = pair("BertModel")
    call, batch, _, mask = flat_call("BertModel")
    patched.pooler = copy.deepcopy(stock.pooler)
    with pytest.raises(ValueError, match=r"one row would mix .*: the pooler was replaced after patching"):
        patched(batch)
    assert_same(visible(patched(**call), mask), visible(stock(**call), mask))


@pytest.mark.parametrize("name", [family.prefix + "ForTokenClassification" for family in FAMILIES.values()])
def test_more_tokens_in_one_row_than_the_model_has_positions(name: str) -> None:
    """A row of all tokens is longer than a sequence may be, and nobody has said its token types."""
    stock, patched = pair(name, max_position_embeddings=20)
    rows = torch.randint(2, 50, (5, 10))
    ours = patched(PackedBatch.from_lists(rows.tolist())).logits[0]
    assert_same({"logits": ours}, {"logits": stock(rows).logits.flatten(0, 1)})
    assert ran(patched) == {"packed": 1}
