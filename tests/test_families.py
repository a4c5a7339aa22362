"""Every family, head and form of mask against stock, in float64 with large weights, and that the fused path ran."""

import copy
import importlib
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bertfast
from bertfast import Packing, architectures, layer, patch, seams
from bertfast.architectures import parameters_of

transformers = pytest.importorskip("transformers")

from agreement import (  # noqa: E402
    TOLERANCE,
    assert_agree,
    assert_same,
    exact_path,
    gradients,
    own_loss,
    pair,
    ran,
    reads_all,
    reads_first,
    reasons,
    visible,
)
from compatibility import note  # noqa: E402
from small_models import SETTINGS, draw_weights  # noqa: E402
from stock_models import (  # noqa: E402
    BATCH,
    CLASSES,
    FAMILIES,
    LEGACY,
    PAIRS,
    SEQ_LEN,
    call_of,
    family_of,
    head_of,
    mask_of,
)

FORMS = ("none", "ones", "right", "left", "holes", "empty row")
BASES = tuple(family.classes[0] for family in FAMILIES.values())


pytestmark = pytest.mark.usefixtures("one_thread")


def test_all_families_are_tested() -> None:
    for family in bertfast.families():
        ours = {family.model, *family.heads}
        assert set(FAMILIES[family.name].classes) == ours, family.name
        assert family.name in str(family) and family.model in str(family)
        stock = importlib.import_module(family.module)
        assert all(hasattr(stock, name) for name in ours)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "attention"), PAIRS)
def test_exact_is_stock(name: str, attention: str, form: str, train: bool) -> None:
    if LEGACY and (form, attention) == ("empty row", "eager") and name.startswith("DistilBert"):
        pytest.skip("stock code of transformers 4 overflows in float64, to NaN")
    stock, patched = (model.train(train) for model in pair(name, attention=attention))
    mask = mask_of(form)
    path = exact_path(name, form)
    assert_agree(patched, stock, call_of(name, mask), mask, everything=path == "rectangle")
    assert ran(patched) == {path: 1}
    if not train and attention == family_of(name).attentions[0]:
        note({"none": "no mask", "ones": "a mask of ones"}.get(form, f"padding: {form}"), name, path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSES)
def test_drop_is_stock_on_valid_tokens(name: str, form: str) -> None:
    stock, patched = pair(name, padding="drop")
    mask = mask_of(form)
    call = call_of(name, mask)
    if head_of(name) == "ForQuestionAnswering":  # answers at valid tokens, whatever the mask
        answers = torch.full((BATCH,), SEQ_LEN - 1) if form == "left" else torch.tensor([0, 0, 1])
        call |= dict.fromkeys(("start_positions", "end_positions"), answers)
    ours, theirs = patched(**call), stock(**call)
    path = "packed"
    if name.startswith("MPNet") and form == "holes":
        path = "rectangle"
    unlike: set[str] = set()
    if form not in ("none", "ones") and reads_all(name):
        unlike.add("loss")
        if form in ("left", "holes") and head_of(name) == "ForQuestionAnswering" and path == "packed":
            assert_same({"loss": ours.loss}, {"loss": own_loss(name, visible(theirs, mask), call, mask)})
    if form in ("left", "empty row") and reads_first(name):
        unlike |= {"loss", "logits", "seq_relationship_logits", "pooler_output"}
    assert all(v.isfinite().all() for v in visible(ours, mask).values())
    agree = [{k: v for k, v in visible(o, mask).items() if k not in unlike} for o in (ours, theirs)]
    assert_same(*agree)
    if agree[1]:
        found = [gradients(m, o, mask, without=tuple(unlike)) for m, o in ((patched, ours), (stock, theirs))]
        assert_same(*found, 10 * TOLERANCE)
    assert ran(patched) == {path: 1}
    if form == "left":
        note("padding: left, dropped", name, path)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not (LEGACY and name == "distilbert")])
def test_dropped_padding_on_the_left_leaves_the_first_token_in_front(family: str) -> None:
    """Heads that read position 0 get what they get of the same sequences, with the same positions, on the left."""
    name = FAMILIES[family].classes[2]
    assert name.endswith("ForSequenceClassification")
    stock, patched = pair(name, padding="drop")
    mask = mask_of("left")
    call = call_of(name, mask)
    positions = torch.arange(SEQ_LEN).expand(BATCH, -1)
    if FAMILIES[family].pad == 1:  # counted from the padding token's id on
        counted = call["input_ids"] != 1
        positions = counted.cumsum(1) * counted + 1
    order = (mask == 0).int().argsort(stable=True, dim=1)
    right = {k: v.gather(1, order) for k, v in call.items() if k != "labels"} | {"labels": call["labels"]}
    theirs = stock(**right, position_ids=positions.gather(1, order))
    ours = patched(**call)
    assert_same(visible(ours, None), visible(theirs, None))
    assert_same(*(gradients(m, o, None) for m, o in ((patched, ours), (stock, theirs))), 10 * TOLERANCE)


@pytest.mark.parametrize("name", BASES)
def test_arguments_of_base_models(name: str) -> None:
    """Positions, types, embeddings of words given as tensors, tuples instead of outputs, other dtypes of ids."""
    stock, patched = pair(name)
    mask = mask_of("right")
    call = call_of(name, mask)
    others: list[dict[str, Any]] = [
        {"return_dict": False},
        {"input_ids": call["input_ids"].int(), "attention_mask": mask.bool()},
        {"input_ids": None, "inputs_embeds": stock.get_input_embeddings()(call["input_ids"]).detach()},
    ]
    if "position_ids" in parameters_of(type(stock)):
        others += [{"position_ids": torch.randint(0, 40, shape)} for shape in ((BATCH, SEQ_LEN), (1, SEQ_LEN))]
    if "token_type_ids" in call:
        others.append({"token_type_ids": None})
    for other in others:
        arguments = {k: v for k, v in (call | other).items() if v is not None}
        ours, theirs = patched(**arguments), stock(**arguments)
        assert type(ours) is type(theirs) and len(ours) == len(theirs), other
        assert_same({"h": ours[0][mask.bool()]}, {"h": theirs[0][mask.bool()]})
    assert ran(patched) == {"packed": len(others)}, reasons(patched)


@pytest.mark.skipif(LEGACY, reason="transformers 4 takes no such masks, or none that all families take")
@pytest.mark.parametrize(("name", "attention"), [pair for pair in PAIRS if pair[0] in BASES])
def test_masks_for_each_query(name: str, attention: str) -> None:
    """(batch, 1, queries, keys), which no padding says: the fused layers on the rectangle, with that very mask."""
    stock, patched = pair(name, attention=attention)
    torch.manual_seed(3)
    seen = (torch.rand(BATCH, 1, SEQ_LEN, SEQ_LEN) < 0.7) | torch.eye(SEQ_LEN, dtype=torch.bool)
    given = seen if attention == "sdpa" else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    call = call_of(name, None) | {"attention_mask": given}
    assert_agree(patched, stock, call, None)
    whole = patched(**call_of(name, None))[0]
    assert (whole - patched(**call)[0]).abs().max() > 1e-3
    assert ran(patched) == {"rectangle": 2, "packed": 1}
    note("a mask for each query", name, "rectangle")


@pytest.mark.parametrize("name", BASES)
def test_dropout_in_training(name: str) -> None:
    """Seeded runs repeat, others differ, and what is not dropped is scaled as stock scales it."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    stock, patched = (model.float().train() for model in pair(name, **rates))
    mask = mask_of("right")
    call = call_of(name, mask)

    def run(model: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(**call)[0][mask.bool()]

    assert torch.equal(run(patched, 1), run(patched, 1)) and not torch.allclose(run(patched, 1), run(patched, 2))
    n = 300
    ours, theirs = (torch.stack([run(m, i) for i in range(n)]) for m in (patched, stock))
    # Means of n draws of two distributions that are the same: five standard errors of the difference, everywhere.
    error = ((ours.var(0) + theirs.var(0)) / n).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-4).float().mean() > 0.999
    assert (ours.var(0).mean() / theirs.var(0).mean() - 1).abs() < 0.1
    assert set(ran(patched)) == {"packed"}


@pytest.mark.parametrize("name", BASES)
def test_copies_and_unpatching(name: str) -> None:
    stock, patched = pair(name)
    mask = mask_of("right")
    call = call_of(name, mask)
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert_agree(other, stock, call, mask)
        assert ran(other) == {"packed": 1}
        bertfast.unpatch(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in stock.modules()]
        assert torch.equal(other(**call)[0], stock(**call)[0])


def test_embeddings_of_another_width_and_without_projection() -> None:
    for size in (48, 64):
        stock, patched = pair("ElectraForMaskedLM", embedding_size=size)
        mask = mask_of("right")
        assert_agree(patched, stock, call_of("ElectraForMaskedLM", mask), mask)
        assert ran(patched) == {"packed": 1}


@pytest.mark.parametrize("summary", ["first", "last", "mean"])
def test_summaries(summary: str) -> None:
    stock, patched = pair("ElectraForMultipleChoice", summary_type=summary)
    mask = mask_of("right")
    assert_agree(patched, stock, call_of("ElectraForMultipleChoice", mask), mask)
    assert ran(patched) == {"packed" if summary == "first" else "rectangle": 1}


# --- wrong variants: the comparison has to catch each of them, in every family


def _wrong_scale(m: pytest.MonkeyPatch) -> None:
    right, biased = seams.varlen_attention, seams.biased_attention
    m.setattr(seams, "varlen_attention", lambda *a, **k: right(*a, **{**k, "scale": k["scale"] * 1.05}))
    m.setattr(seams, "biased_attention", lambda *a, **k: biased(*a, **{**k, "scale": k["scale"] * 1.05}))


def _tanh_gelu(m: pytest.MonkeyPatch) -> None:
    right = seams.encoder_layer
    m.setattr(seams, "encoder_layer", lambda x, a, p, s, k: right(x, a, p, s._replace(activation="gelu_tanh"), k))


def _ignored_mask(m: pytest.MonkeyPatch) -> None:
    right, biased = seams.varlen_attention, seams.biased_attention
    whole = lambda c: torch.stack((c[0], c[-1]))  # noqa: E731
    m.setattr(
        seams,
        "varlen_attention",
        lambda q, cu_seqlens, max_seqlen, order, **k: right(q, whole(cu_seqlens), max_seqlen=len(q), **k),
    )
    padded = lambda b, n: torch.nn.functional.pad(b, (0, n - b.shape[-1], 0, n - b.shape[-1]))  # noqa: E731
    m.setattr(seams, "biased_attention", lambda q, lengths, bias, **k: biased(q, (len(q),), padded(bias, len(q)), **k))


def _no_residual(m: pytest.MonkeyPatch) -> None:
    right = layer.residual_layer_norm
    m.setattr(layer, "residual_layer_norm", lambda x, r, *a, **k: right(x, torch.zeros_like(r), *a, **k))


def _wrong_positions(m: pytest.MonkeyPatch) -> None:
    right, counts = Packing.position_ids, Packing.running_counts
    m.setattr(Packing, "position_ids", lambda self: right(self).roll(1))
    m.setattr(Packing, "running_counts", lambda self, counted: counts(self, counted).roll(1))


def _padding_row_learns(m: pytest.MonkeyPatch) -> None:
    right = seams.embed_layer_norm
    m.setattr(seams, "embed_layer_norm", lambda *a, padding_idx, **k: right(*a, **k))


def _stale_weights(m: pytest.MonkeyPatch) -> None:
    right, first = seams.encoder_layer, {}

    def stale(x: Tensor, attend: Callable, parameters: Any, *rest: Any) -> Tensor:
        kept = first.setdefault(parameters.up_weight.data_ptr(), parameters.up_weight.detach() * 1.001)
        return right(x, attend, parameters._replace(up_weight=kept), *rest)

    m.setattr(seams, "encoder_layer", stale)


WRONG = (_wrong_scale, _tanh_gelu, _ignored_mask, _no_residual, _wrong_positions, _padding_row_learns, _stale_weights)


@pytest.mark.parametrize("break_it", WRONG, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("name", BASES)
def test_wrong_variants_are_caught(name: str, break_it: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, patched = pair(name)
    mask = mask_of("right")
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        assert_agree(patched, stock, call_of(name, mask), mask)


@pytest.mark.parametrize("name", [f.classes[0] for f in FAMILIES.values() if f.pad == 1])
def test_a_padding_row_of_positions_that_learns_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, patched = pair(name)
    right = seams.embed_layer_norm
    monkeypatch.setattr(seams, "embed_layer_norm", lambda *a, position_padding_idx, **k: right(*a, **k))
    with pytest.raises(AssertionError, match="position_embeddings"):
        assert_agree(patched, stock, call_of(name, None), None)


def test_a_bias_that_is_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, patched = pair("MPNetModel")
    mask = mask_of("right")
    right = seams.biased_attention
    monkeypatch.setattr(seams, "biased_attention", lambda q, lengths, bias, **k: right(q, lengths, bias * 0, **k))
    with pytest.raises(AssertionError):
        assert_agree(patched, stock, call_of("MPNetModel", mask), mask)


# --- one more family


@pytest.fixture
def families_as_before() -> Iterator[None]:
    before = bertfast.families()
    yield
    architectures._FAMILIES[:] = before
    bertfast.register_family(before[-1])  # forgets what was looked up meanwhile


@pytest.mark.skipif(LEGACY, reason="its embeddings have another name there")
def test_the_family_of_the_readme(families_as_before: None) -> None:
    stock = transformers.Data2VecTextModel(transformers.Data2VecTextConfig(**SETTINGS, pad_token_id=1)).double().eval()
    draw_weights(stock)
    with pytest.raises(bertfast.UnsupportedModelError, match="BertModel, RobertaModel"):
        patch(copy.deepcopy(stock))
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec(re.search(r"```python\n(import dataclasses.*?)```", readme, re.DOTALL)[1], namespace)
    family = namespace["data2vec"]
    assert bertfast.families()[-1] is family and pickle.loads(pickle.dumps(family)) is family
    bertfast.register_family(family)  # again: in the place of itself
    assert len(bertfast.families()) == len(FAMILIES) + 1
    patched = patch(copy.deepcopy(stock))
    mask = mask_of("right")
    assert_agree(patched, stock, call_of("RobertaModel", mask), mask)
    assert ran(patched) == {"packed": 1}
    saved = pickle.dumps(patched)
    architectures._FAMILIES.remove(family)
    with pytest.raises((AttributeError, bertfast.UnsupportedModelError), match=r"Data2Vec|register_family"):
        pickle.loads(saved)
