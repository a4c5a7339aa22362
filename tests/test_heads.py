"""Every head against transformers' own: logits, losses and the gradient of every parameter, weights drawn large.

transformers looks at padding in two places that bertfast does not: the pooler under left padding (see test_model) and
the softmax of question answering. There, the comparison is with transformers on each sequence by itself.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, SETTINGS, make_mask
from torch import Tensor

import bertfast
from bertfast import BertConfig, PackedBatch

ONE_VALUE_A_SEQUENCE = {"BertForNextSentencePrediction", "BertForSequenceClassification"}
ONE_VALUE_A_TOKEN = {"BertForMaskedLM", "BertForTokenClassification"}


def token_labels(mask: Tensor | None, high: int) -> Tensor:
    """(3, 11) labels, a third of them -100, as are those in the padding (which transformers would count)."""
    labels = torch.randint(0, high, (3, 11))
    labels[torch.rand(3, 11) < 0.3] = -100
    labels[2, 0] = 1
    return labels if mask is None else labels.masked_fill(mask == 0, -100)


def assert_same_gradients(stock: torch.nn.Module, ours: torch.nn.Module, reaches_all: bool = True) -> None:
    expected = dict(stock.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        if reaches_all:
            assert parameter.grad is not None, name
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = torch.zeros_like(parameter) if expected[name].grad is None else expected[name].grad
        torch.testing.assert_close(grad, wanted, msg=lambda m, name=name: f"{name}: {m}")


def compare(stock: Any, ours: Any, inputs: dict, logits: tuple[str, ...], valid: Tensor | None = None) -> None:
    """Logits, loss and gradients of both on the same inputs; logits of tokens at the valid ones only."""
    theirs, out = stock(**inputs), ours(**inputs)
    for name in logits:
        a, b = getattr(out, name), getattr(theirs, name)
        assert a.shape == b.shape
        by_token = valid is not None and a.dim() == 3
        torch.testing.assert_close(a[valid] if by_token else a, b[valid] if by_token else b)
        if by_token:
            assert (a[~valid] == 0).all()
    torch.testing.assert_close(out.loss, theirs.loss)
    theirs.loss.backward()
    out.loss.backward()
    assert_same_gradients(stock, ours)


@pytest.mark.parametrize("name", sorted(ONE_VALUE_A_TOKEN))
def test_heads_on_tokens(twins, ids, mask, name):
    stock, ours = twins(name, num_labels=5)
    labels = token_labels(mask, 53 if name == "BertForMaskedLM" else 5)
    valid = torch.ones(3, 11, dtype=torch.bool) if mask is None else mask.bool()
    compare(stock, ours, {"input_ids": ids, "attention_mask": mask, "labels": labels}, ("logits",), valid)


def test_pre_training(twins, ids, first_valid_mask):
    stock, ours = twins("BertForPreTraining")
    valid = torch.ones(3, 11, dtype=torch.bool) if first_valid_mask is None else first_valid_mask.bool()
    inputs = {
        "input_ids": ids,
        "attention_mask": first_valid_mask,
        "token_type_ids": torch.randint(0, 2, (3, 11)),
        "labels": token_labels(first_valid_mask, 53),
        "next_sentence_label": torch.tensor([0, 1, 1]),
    }
    compare(stock, ours, inputs, ("prediction_logits", "seq_relationship_logits"), valid)
    for missing in ("labels", "next_sentence_label"):
        assert ours(**{k: v for k, v in inputs.items() if k != missing}).loss is None


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_loss_without_logits_is_the_same(twins, ids, first_valid_mask, name, packed):
    stock, ours = twins(name)
    labels = token_labels(first_valid_mask, 53)
    given = {"next_sentence_label": torch.tensor([0, 1, 1])} if name == "BertForPreTraining" else {}
    expected = stock(input_ids=ids, attention_mask=first_valid_mask, labels=labels, **given)
    if packed:
        valid = torch.ones_like(ids) if first_valid_mask is None else first_valid_mask
        rows = [row[keep == 1].tolist() for row, keep in zip(ids, valid, strict=True)]
        chosen = [row[keep == 1].tolist() for row, keep in zip(labels, valid, strict=True)]
        batch = PackedBatch.from_lists(rows, labels=chosen, token_labels=True)
        if any(keep.tolist() != sorted(keep.tolist(), reverse=True) for keep in valid):
            return  # positions count what was in front of a sequence, or inside it
        out = ours(batch, output_logits=False, **given)
    else:
        out = ours(ids, first_valid_mask, labels=labels, output_logits=False, **given)
    assert (out.logits if name == "BertForMaskedLM" else out.prediction_logits) is None
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
    expected.loss.backward()
    assert_same_gradients(stock, ours)


def test_neither_logits_nor_labels(build, ids):
    with pytest.raises(ValueError, match="give labels"):
        build("BertForMaskedLM")(ids, output_logits=False)


def test_next_sentence(twins, ids, first_valid_mask):
    stock, ours = twins("BertForNextSentencePrediction")
    inputs = {"input_ids": ids, "attention_mask": first_valid_mask, "labels": torch.tensor([0, 1, 1])}
    compare(stock, ours, inputs, ("logits",))


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
        ({"num_labels": 1}, torch.tensor([[0.5], [-1.0], [2.0]])),
        ({"num_labels": 3}, torch.tensor([0, 2, 1])),
        ({"num_labels": 3}, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])),
        ({"num_labels": 3, "problem_type": "regression"}, torch.randn(3, 3)),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.tensor([-100, 2, 1])),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, torch.tensor([[0.0, 1], [1, 1], [0, 0]])),
    ],
)
def test_sequence_classification(twins, ids, first_valid_mask, settings, labels):
    stock, ours = twins("BertForSequenceClassification", **settings)
    labels = labels.double() if labels.is_floating_point() else labels
    compare(stock, ours, {"input_ids": ids, "attention_mask": first_valid_mask, "labels": labels}, ("logits",))


def test_the_kind_of_problem_is_read_from_the_labels_each_time(build, ids):
    model = build("BertForSequenceClassification", num_labels=3)
    single = model(ids, labels=torch.tensor([0, 1, 2])).loss
    several = model(ids, labels=torch.eye(3)).loss
    assert single != several and model.config.problem_type is None
    assert model(ids, labels=torch.tensor([0, 1, 2])).loss == single


def test_multiple_choice(twins, first_valid_mask):
    stock, ours = twins("BertForMultipleChoice")
    mask = None if first_valid_mask is None else first_valid_mask.repeat(2, 1).view(2, 3, 11)
    inputs = {
        "input_ids": torch.randint(0, 53, (2, 3, 11)),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (2, 3, 11)),
        "position_ids": torch.arange(11).expand(2, 3, 11),
        "labels": torch.tensor([2, 0]),
    }
    compare(stock, ours, inputs, ("logits",))
    vectors = torch.randn(2, 3, 11, 64, dtype=torch.float64)
    theirs, out = (m(inputs_embeds=vectors, attention_mask=mask).logits for m in (stock, ours))
    torch.testing.assert_close(out, theirs)


def test_question_answering_without_padding(twins, ids):
    stock, ours = twins("BertForQuestionAnswering")
    inputs = {"input_ids": ids, "start_positions": torch.tensor([0, 4, 30]), "end_positions": torch.tensor([3, 11, 10])}
    compare(stock, ours, inputs, ("start_logits", "end_logits"))
    inputs = {k: v if k == "input_ids" else v[:, None] for k, v in inputs.items()}
    torch.testing.assert_close(ours(**inputs).loss, stock(**inputs).loss)
    inputs["start_positions"] = torch.tensor([-7, 4, 2])
    inputs["end_positions"] = torch.tensor([2, 4, 2])
    torch.testing.assert_close(ours(**inputs).loss, stock(**inputs).loss)


def test_question_answering_leaves_padding_out(twins, ids):
    stock, ours = twins("BertForQuestionAnswering")
    mask, starts, ends = make_mask("right"), torch.tensor([7, 0, 2]), torch.tensor([10, 0, 4])
    out = ours(ids, mask, start_positions=starts, end_positions=ends)
    # transformers, on each sequence by itself: no padding there
    alone = [
        stock(ids[b : b + 1, :n], start_positions=starts[b : b + 1], end_positions=ends[b : b + 1])
        for b, n in enumerate(mask.sum(1))
    ]
    torch.testing.assert_close(out.loss, torch.stack([a.loss for a in alone]).mean())
    for b, single in enumerate(alone):
        torch.testing.assert_close(out.start_logits[b][mask[b].bool()], single.start_logits[0])
        torch.testing.assert_close(out.end_logits[b][mask[b].bool()], single.end_logits[0])
    assert (out.start_logits[mask == 0] == torch.finfo(torch.float64).min).all()
    out.loss.backward()
    torch.stack([a.loss for a in alone]).mean().backward()
    assert_same_gradients(stock, ours)


def test_an_answer_in_the_padding_is_ignored(build, ids):
    model = build("BertForQuestionAnswering")
    mask, inside = make_mask("right"), torch.tensor([7, 0, 2])
    first_alone = model(ids[:1], start_positions=inside[:1], end_positions=inside[:1]).loss
    outside = torch.tensor([7, 5, 9])  # the second has 1 token, the third 5
    torch.testing.assert_close(model(ids, mask, start_positions=outside, end_positions=outside).loss, first_alone)
    empty = model(ids, make_mask("empty row"), start_positions=inside, end_positions=inside)
    assert torch.isfinite(empty.loss) and torch.isfinite(empty.start_logits).all()


BY_TOKEN = (*ONE_VALUE_A_TOKEN, "BertForPreTraining")


def labels_for(name: str, rows: list[list[int]]) -> list | None:
    """Labels of each sequence, as the collator takes them."""
    if name in BY_TOKEN:
        return [[-100 if i % 3 == 0 and i else 1 for i in range(len(row))] for row in rows]
    if name == "BertForQuestionAnswering":
        return [[0, len(row) - 1] for row in rows]
    return None if name in ("BertModel", "BertForMultipleChoice") else [b % 2 for b in range(len(rows))]


@pytest.mark.parametrize("name", [c for c in CLASSES if c not in ("BertModel", "BertForMultipleChoice")])
def test_a_packed_batch_gives_what_the_rectangle_gives(build, name):
    model = build(name)
    rows = [torch.randint(0, 53, (n,)).tolist() for n in (11, 1, 5)]
    batch = PackedBatch.from_lists(rows, labels=labels_for(name, rows), token_labels=name in BY_TOKEN)
    pad = batch.packing.pad
    ids, mask = pad(batch.input_ids), pad(torch.ones(17, dtype=torch.int64))
    given = {"next_sentence_label": torch.tensor([0, 1, 0])} if name == "BertForPreTraining" else {}
    if name == "BertForQuestionAnswering":
        labels = dict(zip(("start_positions", "end_positions"), batch.labels.unbind(1), strict=True))
    else:
        labels = {"labels": pad(batch.labels, -100) if name in BY_TOKEN else batch.labels}
    with torch.no_grad():
        packed = model(batch, **given, output_hidden_states=True)
        padded = model(ids, mask, **labels, **given, output_hidden_states=True)
    assert packed.loss is not None and torch.equal(packed.loss, padded.loss)
    for a, b in zip(packed.to_tuple()[1:-1], padded.to_tuple()[1:-1], strict=True):
        assert torch.equal(a, b if a.shape == b.shape else b[mask.bool()])
    for a, b in zip(packed.hidden_states, padded.hidden_states, strict=True):
        assert torch.equal(a, b[mask.bool()])
    assert packed[0] is packed.loss and packed.packing is batch.packing


def test_multiple_choice_of_a_packed_batch(build):
    model = build("BertForMultipleChoice")
    rows = [torch.randint(0, 53, (n,)).tolist() for n in (11, 1, 5, 3, 3, 8)]
    batch, labels = PackedBatch.from_lists(rows), torch.tensor([2, 0])
    pad = batch.packing.pad
    ids, mask = pad(batch.input_ids), pad(torch.ones(batch.packing.tokens, dtype=torch.int64))
    with torch.no_grad():
        packed = model(batch, labels=labels, num_choices=3)
        padded = model(ids.view(2, 3, 11), mask.view(2, 3, 11), labels=labels)
    assert packed.logits.shape == (2, 3)
    assert torch.equal(packed.logits, padded.logits) and torch.equal(packed.loss, padded.loss)


@pytest.mark.parametrize("name", CLASSES)
def test_state_dict_is_that_of_transformers_in_both_directions(twins, name):
    stock, ours = twins(name)
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_word_table_and_decoder_are_one_parameter(build, name):
    for model in (build(name), copy.deepcopy(build(name)), build(name).to(torch.float32)):
        predictions = model.cls.predictions
        assert predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
        assert predictions.decoder.bias is predictions.bias
    untied = build(name, tie_word_embeddings=False)
    assert untied.cls.predictions.decoder.weight is not untied.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_masked_lm_of_an_untied_model_and_of_another_activation(twins, ids, act):
    stock, ours = twins("BertForMaskedLM", tie_word_embeddings=False, hidden_act=act)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits)


def test_classifier_dropout_is_its_own(build, ids):
    config = {"hidden_dropout_prob": 0.0, "classifier_dropout": 0.5}
    for name in ("BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice"):
        model = build(name, **config).train()
        inputs = ids.view(1, 3, 11) if name == "BertForMultipleChoice" else ids
        torch.manual_seed(1)
        first = model(inputs).logits
        torch.manual_seed(1)
        assert torch.equal(first, model(inputs).logits) and not torch.equal(first, model(inputs).logits)
        assert build(name, hidden_dropout_prob=0.25).dropout.p == 0.25


def test_float32_trains_like_transformers(twins, ids):
    stock, ours = twins("BertForMaskedLM", dtype=torch.float32)
    mask = make_mask("holes")
    labels = token_labels(mask, 53)
    losses = []
    for model in (stock, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[1][-1] < losses[1][0]


def test_loss_is_over_labelled_valid_tokens_only(build, ids):
    model = build("BertForTokenClassification", num_labels=4)
    mask, labels = make_mask("right"), torch.randint(0, 4, (3, 11))
    out = model(ids, mask, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[mask.bool()], labels[mask.bool()]))


def test_no_tokens_at_all(build):
    for name in CLASSES[1:]:
        model, shape = build(name), (2, 3, 0) if name == "BertForMultipleChoice" else (2, 0)
        assert torch.isfinite(model(torch.zeros(shape, dtype=torch.int64))[0]).all(), name


BATCH = PackedBatch.from_lists([[1, 2, 3], [4]])
LABELLED = PackedBatch.from_lists([[1, 2, 3], [4]], labels=[0, 1])
IDS = torch.ones(2, 5, dtype=torch.int64)
ONE = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("BertForMaskedLM", {"input_ids": IDS, "labels": IDS[:, :4]}, r"labels have shape \(2, 4\).* \(2, 5\)"),
        ("BertForMaskedLM", {"input_ids": BATCH, "labels": ONE}, r"labels have shape \(1,\).* \(4,\)"),
        ("BertForTokenClassification", {"input_ids": LABELLED}, r"labels have shape \(2,\).* \(4,\)"),
        ("BertForPreTraining", {"input_ids": IDS, "labels": IDS, "next_sentence_label": ONE}, "for 2 sequences"),
        ("BertForNextSentencePrediction", {"input_ids": IDS, "labels": ONE}, r"shape \(1,\) for 2 sequences"),
        ("BertForSequenceClassification", {"input_ids": LABELLED, "labels": ONE}, "given twice"),
        ("BertForSequenceClassification", {"input_ids": IDS, "labels": torch.zeros(2, 3)}, "multi_label.*one label"),
        ("BertForQuestionAnswering", {"input_ids": IDS, "start_positions": ONE, "end_positions": ONE}, "2 sequences"),
        ("BertForMultipleChoice", {"input_ids": IDS}, r"\(batch, choices, seq_len\).* not \(2, 5\)"),
        ("BertForMultipleChoice", {}, r"\(batch, choices, seq_len\)"),
        ("BertForMultipleChoice", {"input_ids": IDS[None], "num_choices": 3}, "num_choices is 3, but the tokens"),
        ("BertForMultipleChoice", {"input_ids": BATCH}, "num_choices is None: for a PackedBatch of 2"),
        ("BertForMultipleChoice", {"input_ids": BATCH, "num_choices": 3}, "num_choices is 3"),
    ],
)
def test_inputs_that_are_refused(build, name, inputs, message):
    with pytest.raises(ValueError, match=message):
        build(name)(**inputs)


def test_question_answering_has_two_labels():
    with pytest.raises(ValueError, match="2 labels, start and end, not 3"):
        bertfast.BertForQuestionAnswering(BertConfig(**SETTINGS, num_labels=3))
