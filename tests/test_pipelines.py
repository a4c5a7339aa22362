"""transformers.pipeline on patched models, with a real tokenizer: what stock models give, one by one and batched."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bertfast.patching import patch

transformers = pytest.importorskip("transformers")

from agreement import assert_same  # noqa: E402
from compatibility import note  # noqa: E402
from live_models import TOLERANCE32, path_of  # noqa: E402
from stock_models import FAMILIES, LEGACY, build  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the [MASK] is green.", "a", "where would a longer [MASK] than the first one stand?"]


@pytest.fixture
def tokenizer_of(minilm_path: Path) -> Callable[[str], Any]:
    """A real tokenizer, which gives a family what its models take."""

    def load(family: str) -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
        if family not in ("bert", "electra"):
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        return tokenizer

    return load


def pipelines(task: str, name: str, tokenizer: Any, **settings: Any) -> tuple[Any, Any]:
    """Pipelines of a patched and of a stock model."""
    stock = build(
        name,
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=64,
        **settings,
    )
    models = patch(copy.deepcopy(stock)), stock
    ours, theirs = (transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu") for model in models)
    assert ours.model is models[0]
    return ours, theirs


def assert_alike(ours: Any, theirs: Any) -> None:
    """The same in every label, token and place, and nearly the same numbers."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_alike(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_alike(mine, other)
    elif hasattr(theirs, "__float__") and not isinstance(theirs, int):
        assert abs(ours - theirs) <= TOLERANCE32 * abs(theirs)  # among so many tokens, scores are small
    else:
        assert ours == theirs


def compare(ours: Any, theirs: Any, inputs: list, **how: Any) -> None:
    """The same alone and in a batch; different inputs have different results."""
    found = theirs(inputs, batch_size=len(inputs), **how)
    assert_alike(ours(inputs, batch_size=len(inputs), **how), found)
    assert_alike([ours(one, **how) for one in inputs], [theirs(one, **how) for one in inputs])
    assert found[0] != found[1]


TASKS = {
    "fill-mask": "ForMaskedLM",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tasks(task: str, family: str, tokenizer_of: Callable[[str], Any]) -> None:
    name = FAMILIES[family].prefix + TASKS[task]
    ours, theirs = pipelines(task, name, tokenizer_of(family), num_labels=3)
    texts = [TEXTS[0], TEXTS[2]] if task == "fill-mask" else TEXTS
    how = {"text-classification": {"top_k": None}, "token-classification": {}, "fill-mask": {"top_k": 3}}[task]
    compare(ours, theirs, texts, **how)
    assert path_of(ours.model) == "packed"
    note("pipeline", name, "packed")


@pytest.mark.parametrize("family", FAMILIES)
def test_features(family: str, tokenizer_of: Callable[[str], Any]) -> None:
    name = FAMILIES[family].prefix + "Model"
    tokenizer = tokenizer_of(family)
    ours, theirs = pipelines("feature-extraction", name, tokenizer)
    for how in ({"batch_size": len(TEXTS)}, {}):
        for text, mine, other in zip(TEXTS, ours(TEXTS, **how), theirs(TEXTS, **how), strict=True):
            valid = len(tokenizer(text)["input_ids"])
            assert len(mine[0]) == len(other[0]) >= valid  # those of a batch have padding behind
            mine, other = torch.tensor(mine[0][:valid]), torch.tensor(other[0][:valid])
            assert_same({text: mine}, {text: other}, TOLERANCE32)
    assert path_of(ours.model) == "packed"
    note("pipeline", name, "packed")


def test_zero_shot_classification(tokenizer_of: Callable[[str], Any]) -> None:
    labels = {"label2id": {"entailment": 0, "neutral": 1, "contradiction": 2}}
    labels["id2label"] = {i: label for label, i in labels["label2id"].items()}
    name = "BertForSequenceClassification"
    ours, theirs = pipelines("zero-shot-classification", name, tokenizer_of("bert"), **labels)
    compare(ours, theirs, TEXTS[:2], candidate_labels=["a colour", "some quite different thing"])
    assert path_of(ours.model) == "packed"


@pytest.mark.skipif(not LEGACY, reason="transformers 5 has no pipeline for question answering any more")
@pytest.mark.parametrize("family", FAMILIES)
def test_question_answering(family: str, tokenizer_of: Callable[[str], Any]) -> None:
    """The pipeline's softmax is over all positions, but it masks the padding itself."""
    name = FAMILIES[family].prefix + "ForQuestionAnswering"
    ours, theirs = pipelines("question-answering", name, tokenizer_of(family))
    questions = [
        {"question": "what is green?", "context": "the grass is green, and the sky is something else."},
        {"question": "who?", "context": "nobody."},
    ]
    compare(ours, theirs, questions)
