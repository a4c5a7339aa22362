"""The look-up of classes and activations by name."""

import copy
import pickle

import pytest
import torch

from bertfast import families

transformers = pytest.importorskip("transformers")


def test_roles_are_exact() -> None:
    from transformers.models.bert import modeling_bert

    for role in ("model", "embeddings", "encoder", "layer"):
        kind = getattr(modeling_bert, getattr(families.BERT, role))
        assert families.role_of(kind) == (families.BERT, role)
        assert families.role_of(type("Derived", (kind,), {})) is None


def test_heads_include_subclasses() -> None:
    for name, reads in families.BERT.heads.items():
        kind = getattr(transformers, name)
        assert families.head_of(kind) == families.head_of(type("Derived", (kind,), {})) == (families.BERT, reads)
    assert families.head_of(transformers.BertForSequenceClassification) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", None),
        ("silu", None),
        ("quick_gelu", None),
    ],
)
def test_activations(name: str, expected: str | None) -> None:
    assert families.activation_of(transformers.activations.ACT2FN[name]) == expected


def test_torch_activations() -> None:
    assert families.activation_of(torch.nn.GELU()) == "gelu"
    assert families.activation_of(torch.nn.GELU("tanh")) == "gelu_tanh"
    assert families.activation_of(torch.nn.functional.gelu) == "gelu"
    assert families.activation_of(torch.nn.functional.relu) is None


def test_copies_are_the_family_itself() -> None:
    assert copy.deepcopy(families.BERT) is families.BERT
    assert pickle.loads(pickle.dumps(families.BERT)) is families.BERT
