"""A model on features: the logits and losses of stock code on each sequence alone, without padding and with it."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.errors import DataError, UnsupportedModelError

transformers = pytest.importorskip("transformers")

import stock_models  # noqa: E402

from bertfast.train import runner as module  # noqa: E402
from bertfast.train.features import Feature, check_vocabulary  # noqa: E402
from bertfast.train.runner import Runner  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (4, 9, 1, 6)
LABELS = {"sequence": [1, 0, 1, 0], "span": [(1, 2), (0, 8), (0, 0), (5, 5)]}
HEADS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification", "span": "ForQuestionAnswering"}


def make_features(kind: str) -> list[Feature]:
    """Sequences of ragged lengths with types; labels of tokens with some that are ignored."""
    draw = np.random.default_rng(0)
    found = []
    for i, n in enumerate(LENGTHS):
        ids, types = draw.integers(5, 50, n).tolist(), draw.integers(0, 2, n).tolist()
        labels = [-100 if token % 3 == 0 else token % 2 for token in ids] if kind == "token" else LABELS[kind][i]
        found.append(Feature(i, ids, types, labels))
    return found


def alone(model: Any, feature: Feature, types: bool) -> Tensor:
    """Stock's logits for a sequence."""
    call = {"input_ids": torch.tensor([feature.input_ids])}
    if types:
        call["token_type_ids"] = torch.tensor([feature.token_type_ids])
    with torch.no_grad():
        found = model(**call)
    if "start_logits" in found:
        return torch.stack((found.start_logits[0], found.end_logits[0]), -1)
    return found.logits[0]


def expected_loss(kind: str, logits: list[Tensor], features: list[Feature]) -> float:
    """The cross entropy, of spans for starts and ends in turn."""
    labels = [torch.tensor(feature.labels) for feature in features]
    if kind == "sequence":
        return float(F.cross_entropy(torch.stack(logits), torch.stack(labels)))
    if kind == "token":
        return float(F.cross_entropy(torch.cat(logits), torch.cat(labels)))
    return float(torch.stack([F.cross_entropy(x.T, y) for x, y in zip(logits, labels, strict=True)]).mean())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "DistilBert"])
@pytest.mark.parametrize("kind", HEADS)
def test_logits_and_losses(monkeypatch: pytest.MonkeyPatch, kind: str, family: str, padded: bool) -> None:
    stock = stock_models.build(family + HEADS[kind], dtype=torch.float32)
    features = make_features(kind)
    logits = [alone(stock, feature, types=family in ("Bert", "Roberta")) for feature in features]
    if padded:

        def refuse(model: Any) -> None:
            raise UnsupportedModelError("not this one")

        monkeypatch.setattr(module, "patch", refuse)
    runner = Runner(copy.deepcopy(stock), kind, stock_models.family_of(family + HEADS[kind]).pad)
    assert runner.padded == ("not this one" if padded else None)
    found = dict(runner.logits(features, batch_size=3))
    assert set(found) == set(range(len(LENGTHS)))
    for i, expected in enumerate(logits):
        assert found[i].dtype == np.float32 and found[i].shape == expected.shape
        assert found[i] == pytest.approx(expected.numpy(), abs=2e-5)
    if not (padded and kind == "span"):  # stock counts padding among the places where a span may begin
        assert runner.loss(features).item() == pytest.approx(expected_loss(kind, logits, features), rel=1e-5)


def test_tokens_that_the_model_does_not_know() -> None:
    model = stock_models.build("BertForTokenClassification")
    check_vocabulary([Feature(0, [2, 52, 3])], model)
    with pytest.raises(DataError, match="gives token 53, but the model has embeddings of 53 tokens only"):
        check_vocabulary([Feature(0, [2, 3]), Feature(1, [2, 53, 3])], model)
