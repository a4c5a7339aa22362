"""The look-up of classes and activations by name."""

import copy
import pickle

import pytest
import torch

from bertfast import architectures

transformers = pytest.importorskip("transformers")


def test_roles_are_exact() -> None:
    from transformers.models.bert import modeling_bert

    for role in ("model", "embeddings", "encoder", "layer"):
        kind = getattr(modeling_bert, getattr(architectures.BERT, role))
        assert architectures.role_of(kind) == (architectures.BERT, role)
        assert architectures.role_of(type("Derived", (kind,), {})) is None


def test_heads_include_subclasses() -> None:
    for name, reads in architectures.BERT.heads.items():
        kind = getattr(transformers, name)
        derived = type("Derived", (kind,), {})
        assert architectures.head_of(kind) == architectures.head_of(derived) == (architectures.BERT, reads)
    assert architectures.head_of(transformers.BertModel) is None


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
    assert architectures.activation_of(transformers.activations.ACT2FN[name]) == expected


def test_torch_activations() -> None:
    assert architectures.activation_of(torch.nn.GELU()) == "gelu"
    assert architectures.activation_of(torch.nn.GELU("tanh")) == "gelu_tanh"
    assert architectures.activation_of(torch.nn.functional.gelu) == "gelu"
    assert architectures.activation_of(torch.nn.functional.relu) is None


def test_copies_are_the_family_itself() -> None:
    assert copy.deepcopy(architectures.BERT) is architectures.BERT
    assert pickle.loads(pickle.dumps(architectures.BERT)) is architectures.BERT
