"""patch(model, output_logits=False): the loss of masked language modelling from the labelled tokens alone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bertfast
from bertfast import PackedBatch, patch

transformers = pytest.importorskip("transformers")

from agreement import TOLERANCE, assert_same, ran  # noqa: E402
from stock_models import FAMILIES, build, call_of, mask_of  # noqa: E402

MODELS = (*(family.prefix + "ForMaskedLM" for family in FAMILIES.values()), "BertForPreTraining")
pytestmark = pytest.mark.usefixtures("one_thread")


def pair(name: str = "BertForMaskedLM", **settings: Any) -> tuple[Any, Any]:
    """A stock model, and its copy that returns no logits."""
    stock = build(name, **settings)
    return stock, patch(copy.deepcopy(stock), output_logits=False)


def sparse_call(name: str, form: str = "right") -> dict[str, Tensor]:
    """A call with labels on a third of the valid tokens."""
    call = call_of(name, mask_of(form))
    return call | {"labels": call["labels"].masked_fill(torch.rand(call["labels"].shape) < 0.67, -100)}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(ours: nn.Module, out: Any, stock: nn.Module, expected: Any) -> None:
    assert_same({"loss": out}, {"loss": expected})
    assert_same(gradients(ours, out), gradients(stock, expected), 10 * TOLERANCE)


@pytest.mark.parametrize("form", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_stock(name: str, form: str) -> None:
    stock, ours = pair(name)
    call = sparse_call(name, form)
    out, expected = ours(**call), stock(**call)
    assert type(out) is type(expected)
    assert set(out) == set(expected) - {"logits", "prediction_logits"}
    assert_same_training(ours, out.loss, stock, expected.loss)
    assert sum(ran(ours).values()) == 1 and "stock" not in ran(ours)


@pytest.mark.parametrize("name", MODELS)
def test_calls_without_labels_return_logits(name: str) -> None:
    stock, ours = pair(name)
    call = {k: v for k, v in sparse_call(name, "none").items() if "label" not in k}
    out, expected = ours(**call), stock(**call)
    assert_same(dict(out), dict(expected))


def test_pre_training_with_one_label_has_no_loss() -> None:
    stock, ours = pair("BertForPreTraining")
    call = sparse_call("BertForPreTraining", "none")
    call.pop("next_sentence_label")
    out, expected = ours(**call), stock(**call)
    assert out.loss is expected.loss is None
    assert_same({"logits": out.prediction_logits}, {"logits": expected.prediction_logits})


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_tuples(name: str) -> None:
    stock, ours = pair(name)
    call = sparse_call(name)
    out, expected = ours(**call, return_dict=False), stock(**call, return_dict=False)
    assert isinstance(out, tuple) and len(out) == len(expected) - 1
    assert_same({"loss": out[0]}, {"loss": expected[0]})


def test_labels_given_by_place_and_hidden_states() -> None:
    stock, ours = pair()
    call = sparse_call("BertForMaskedLM", "none")
    out = ours(call["input_ids"], labels=call["labels"], output_hidden_states=True)
    expected = stock(call["input_ids"], labels=call["labels"], output_hidden_states=True)
    assert_same({"loss": out.loss}, {"loss": expected.loss})
    assert_same(dict(enumerate(out.hidden_states)), dict(enumerate(expected.hidden_states)))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "BertForPreTraining"])
def test_batches_that_never_were_padded(name: str) -> None:
    stock, ours = pair(name)
    call = sparse_call(name)
    keep = call["attention_mask"].bool()

    def rows(key: str) -> list[list[int]]:
        return [row[valid].tolist() for row, valid in zip(call[key], keep, strict=True)]

    batch = PackedBatch.from_lists(rows("input_ids"), rows("token_type_ids"), rows("labels"), token_labels=True)
    given = {k: v for k, v in call.items() if k == "next_sentence_label"}
    assert_same_training(ours, ours(batch, **given).loss, stock, stock(**call).loss)
    assert ran(ours) == {"packed": 1}


def test_the_decoder_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair()
    call = sparse_call("BertForMaskedLM")
    decoder = ours.get_output_embeddings()
    seen = []
    linear = nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is decoder.weight:
            seen.append(tuple(x.shape[:-1]))
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", spy)
    ours(**call)
    labelled = int((call["labels"] != -100).sum())
    assert sorted(seen) == [(1, 0), (labelled,)]


@pytest.mark.parametrize("change", ["hook", "new decoder", "subclass"])
def test_decoders_that_others_look_at_are_given_the_labelled_tokens(change: str) -> None:
    stock, ours = pair()
    seen = []
    if change == "hook":
        ours.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    elif change == "new decoder":
        for model in (stock, ours):
            model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
            model.get_output_embeddings()._forward_pre_hooks.clear()
    else:
        ours.get_output_embeddings().__class__ = type("Adapted", (nn.Linear,), {})
    call = sparse_call("BertForMaskedLM")
    assert_same_training(ours, ours(**call).loss, stock, stock(**call).loss)
    assert seen == ([int((call["labels"] != -100).sum())] if change == "hook" else [])


def test_nothing_labelled_is_nan_as_in_stock() -> None:
    stock, ours = pair()
    call = sparse_call("BertForMaskedLM")
    call["labels"] = torch.full_like(call["labels"], -100)
    assert ours(**call).loss.isnan() and stock(**call).loss.isnan()


def test_labels_that_do_not_fit() -> None:
    _, ours = pair()
    call = sparse_call("BertForMaskedLM")
    with pytest.raises(ValueError, match="give one a token"):
        ours(**call | {"labels": call["labels"][:, :-1]})
    assert ours(**call).loss.isfinite()  # and nothing of the failed call is left


def test_options_change_and_unpatch_restores() -> None:
    stock, ours = pair()
    call = sparse_call("BertForMaskedLM", "none")
    patch(ours)
    assert_same(dict(ours(**call)), dict(stock(**call)))
    patch(ours, output_logits=False)
    patch(ours, output_logits=False)
    assert "logits" not in ours(**call)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert "logits" not in copied(**call)
    decoder = ours.get_output_embeddings()
    bertfast.unpatch(ours)
    assert not decoder._forward_pre_hooks and type(decoder) is nn.Linear
    for key, value in ours(**call).items():
        assert torch.equal(value, stock(**call)[key])


def test_only_for_models_that_score_words() -> None:
    with pytest.raises(ValueError, match="is for masked language models"):
        patch(build("BertForTokenClassification"), output_logits=False)
    with pytest.raises(ValueError, match="is for masked language models"):
        patch(build("ElectraForPreTraining"), output_logits=False)


def test_autocast_and_checkpointing() -> None:
    """In bfloat16 as near to float32 as stock under autocast; the same with layers run again in the backward."""
    stock, ours = (model.train() for model in pair(dtype=torch.float32))
    call = sparse_call("BertForMaskedLM")
    exact = stock(**call).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = stock(**call).loss.item()
        first = gradients(ours, ours(**call).loss)
        assert abs(ours(**call).loss.item() - exact) <= 2 * abs(theirs - exact) + 0.02 * exact
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients(ours, ours(**call).loss)
    assert_same(again, first, 1e-6)


def test_trainer(tmp_path: Any) -> None:
    """Trainer trains and evaluates a model that returns a loss and nothing else."""
    _, ours = pair(dtype=torch.float32)
    call = sparse_call("BertForMaskedLM", "none")
    rows = [{k: v[i] for k, v in call.items()} for i in range(len(call["input_ids"]))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(ours, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
