"""Patched models of sentence-transformers: the vectors and scores of stock ones, in this process and in others."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import SETTINGS
from torch import Tensor, nn

from bertfast.patching import explain, patch, unpatch

pytest.importorskip("transformers")
st = pytest.importorskip("sentence_transformers")

from agreement import ran  # noqa: E402
from compatibility import note  # noqa: E402
from live_models import TOLERANCE32, path_of  # noqa: E402
from stock_models import FAMILIES, build  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["A short one.", "A sentence that is a good deal longer than the first one was.", "Three", "", "the end of it"]
PAIRS = [("what is it", "a test"), ("who", "nobody that I have heard of, at any rate"), ("where", "")]


@pytest.fixture
def saved(tmp_path: Path, minilm_path: Path) -> Callable[[str, int], Path]:
    """saved("BertModel", 1): the folder of a small random model of one label, with a real tokenizer."""

    def save(name: str, num_labels: int = 2) -> Path:
        settings = {"vocab_size": 30522, "pad_token_id": 0, "max_position_embeddings": 64, "num_labels": num_labels}
        settings["type_vocab_size"] = 2  # the tokenizer gives the second text of a pair another type
        build(name, dtype=torch.float32, **settings).save_pretrained(tmp_path)
        for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            (tmp_path / file).write_bytes((minilm_path / file).read_bytes())
        return tmp_path

    return save


@pytest.fixture
def embedders(saved: Callable[..., Path]) -> Callable[..., tuple[Any, Any]]:
    """embedders("bert", "mean"): a stock SentenceTransformer and its patched copy."""

    def make(family: str, pooling: str = "mean") -> tuple[Any, Any]:
        folder = saved(FAMILIES[family].prefix + "Model")
        pools = {
            f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens", "max_tokens")
        }
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
        ]
        (folder / "1_Pooling").mkdir()
        for file, content in {
            "modules.json": modules,
            "1_Pooling/config.json": {"word_embedding_dimension": SETTINGS["hidden_size"], **pools},
            "sentence_bert_config.json": {"max_seq_length": 32},
        }.items():
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
        stock = st.SentenceTransformer(str(folder), device="cpu", prompts={"query": "looking for: "})
        return stock, patch(copy.deepcopy(stock))

    return make


@pytest.fixture
def rerankers(saved: Callable[..., Path]) -> Callable[..., tuple[Any, Any]]:
    """rerankers("bert", 1): a stock CrossEncoder of one label and its patched copy."""

    def make(family: str, num_labels: int) -> tuple[Any, Any]:
        folder = saved(FAMILIES[family].prefix + "ForSequenceClassification", num_labels)
        stock, patched = (st.CrossEncoder(str(folder), device="cpu", max_length=32) for _ in range(2))
        return stock, patch(patched)

    return make


def assert_same_arrays(actual: Any, expected: Any) -> None:
    """The same, and not the same for every text."""
    assert actual.shape == expected.shape and abs(actual - expected).max() <= TOLERANCE32
    assert np.ptp(np.asarray(expected), axis=0).max() > 100 * TOLERANCE32


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("family", FAMILIES)
def test_encode(embedders: Callable[..., tuple[Any, Any]], family: str, pooling: str) -> None:
    stock, patched = embedders(family, pooling)
    assert_same_arrays(patched.encode(TEXTS, batch_size=3), stock.encode(TEXTS, batch_size=3))
    assert abs(patched.encode(TEXTS[1]) - stock.encode(TEXTS[1])).max() <= TOLERANCE32
    assert ran(patched) == {"packed": 3}
    note("SentenceTransformer.encode", FAMILIES[family].prefix + "Model", "packed")


def test_prompts_normalisation_and_token_vectors(embedders: Callable[..., tuple[Any, Any]]) -> None:
    stock, patched = embedders("bert")
    how = {"prompt_name": "query", "normalize_embeddings": True}
    found = patched.encode(TEXTS, **how)
    assert_same_arrays(found, stock.encode(TEXTS, **how))
    assert abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert abs(found - patched.encode(TEXTS, normalize_embeddings=True)).max() > 0.01  # the prompt was read
    how = {"output_value": "token_embeddings"}
    for mine, other in zip(patched.encode(TEXTS, **how), stock.encode(TEXTS, **how), strict=True):
        assert mine.shape == other.shape and (mine - other).abs().max() <= TOLERANCE32
    how = {"convert_to_tensor": True, "truncate_dim": 16}
    assert_same_arrays(patched.encode(TEXTS, **how), stock.encode(TEXTS, **how))
    assert path_of(patched) == "packed"


def test_calls_of_the_module_itself_train(embedders: Callable[..., tuple[Any, Any]]) -> None:
    found = []
    for model in embedders("bert"):
        features = model.tokenize(TEXTS)
        model.train()(features)["sentence_embedding"].square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 30
    for name, expected in found[0].items():
        assert (found[1][name] - expected).abs().max() <= TOLERANCE32 * max(1, expected.abs().max()), name


def test_saved_and_unpatched(embedders: Callable[..., tuple[Any, Any]], tmp_path: Path) -> None:
    stock, patched = embedders("bert")
    expected = stock.encode(TEXTS)
    patched.save(str(tmp_path))
    loaded = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert not explain(loaded).backbones[0].patched
    assert_same_arrays(loaded.encode(TEXTS), expected)
    assert (unpatch(patched).encode(TEXTS) == expected).all()


class CallCounts(nn.Module):
    """Puts into the features how often each path of the base model beside it ran in this process."""

    def __init__(self, watched: nn.Module) -> None:
        super().__init__()
        self.watched = (watched,)  # not a submodule, or the model would hold it twice

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        embeddings = features["sentence_embedding"]
        calls = explain(self.watched[0]).backbones[0].calls
        counts = torch.tensor([calls[path] for path in ("packed", "rectangle", "stock")])
        return features | {"calls": counts.expand(len(embeddings), -1)}


def test_encode_in_other_processes(embedders: Callable[..., tuple[Any, Any]]) -> None:
    stock, patched = embedders("bert")
    expected = stock.encode(TEXTS)
    patched.encode(TEXTS)  # packs weights, which have to stay behind
    patched.append(CallCounts(patched[0]))
    pool = patched.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = patched.encode(TEXTS, pool=pool, chunk_size=2, output_value=None)
    finally:
        patched.stop_multi_process_pool(pool)
    assert_same_arrays(torch.stack([item["sentence_embedding"] for item in found]).numpy(), expected)
    counts: list[Tensor] = [item["calls"] for item in found]
    assert all(packed >= 1 and rectangle == stock == 0 for packed, rectangle, stock in counts)
    note("SentenceTransformer.encode, several processes", "BertModel", "packed")


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_cross_encoder(rerankers: Callable[..., tuple[Any, Any]], family: str, num_labels: int) -> None:
    stock, patched = rerankers(family, num_labels)
    for how in ({}, {"batch_size": 2}, {"activation_fn": nn.Identity()}, {"activation_fn": nn.Tanh()}):
        found = patched.predict(PAIRS, **how)
        assert found.shape == ((3,) if num_labels == 1 else (3, 3))
        assert_same_arrays(found, stock.predict(PAIRS, **how))
    if num_labels == 3:
        found = patched.predict(PAIRS, apply_softmax=True)
        assert_same_arrays(found, stock.predict(PAIRS, apply_softmax=True))
    else:
        ranking = [model.rank("who", ["nobody", "a good many of us"]) for model in (patched, stock)]
        assert [hit["corpus_id"] for hit in ranking[0]] == [hit["corpus_id"] for hit in ranking[1]]
    assert path_of(patched) == "packed"
    note("CrossEncoder.predict", FAMILIES[family].prefix + "ForSequenceClassification", "packed")
