"""Where each model family of transformers keeps what `patch` needs: class names, submodules, heads. Data only.

Nothing here imports transformers: classes are recognised by the module and the name they were defined with, so a
process that never loaded transformers does not pay for it.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

PACKED_TOO = "labels"  # a head that reads padding only where a label stands on it
RECTANGLE = "always"  # a head that reads, or shows, what it computes from padding


@dataclass(frozen=True)
class Family:
    """One architecture with BERT's computation, and the names it has in transformers.

    module: where its classes are defined. model, embeddings, encoder, layer: the classes, recognised exactly, since a
        subclass may compute something else. prefix: the attribute of a task model that holds the base model.
    self_attention: the classes that may stand at `attention.self`.
    heads: task models that read padding positions, and when: see RECTANGLE and PACKED_TOO. A pooler needs no entry.
    pooled_tokens: whether the pooler reads position 0.
    """

    module: str
    model: str
    embeddings: str
    encoder: str
    layer: str
    prefix: str
    self_attention: tuple[str, ...]
    heads: dict[str, str]
    # Paths from a layer and from the embeddings; every module on the way has to be what it is named here.
    layer_modules: tuple[tuple[str, str], ...]
    embedding_modules: tuple[tuple[str, str], ...]


BERT = Family(
    module="transformers.models.bert.modeling_bert",
    model="BertModel",
    embeddings="BertEmbeddings",
    encoder="BertEncoder",
    layer="BertLayer",
    prefix="bert",
    self_attention=("BertSelfAttention", "BertSdpaSelfAttention"),
    heads={
        "BertForQuestionAnswering": RECTANGLE,  # a softmax over all positions
        "BertLMHeadModel": RECTANGLE,  # the loss shifts labels against logits
        "BertForMaskedLM": PACKED_TOO,
        "BertForPreTraining": PACKED_TOO,
        "BertForTokenClassification": PACKED_TOO,
    },
    layer_modules=(
        ("attention", "BertAttention"),
        ("attention.self", "self_attention"),
        ("attention.self.query", "Linear"),
        ("attention.self.key", "Linear"),
        ("attention.self.value", "Linear"),
        ("attention.self.dropout", "Dropout"),
        ("attention.output", "BertSelfOutput"),
        ("attention.output.dense", "Linear"),
        ("attention.output.dropout", "Dropout"),
        ("attention.output.LayerNorm", "LayerNorm"),
        ("intermediate", "BertIntermediate"),
        ("intermediate.dense", "Linear"),
        ("output", "BertOutput"),
        ("output.dense", "Linear"),
        ("output.dropout", "Dropout"),
        ("output.LayerNorm", "LayerNorm"),
    ),
    embedding_modules=(
        ("word_embeddings", "Embedding"),
        ("position_embeddings", "Embedding"),
        ("token_type_embeddings", "Embedding"),
        ("LayerNorm", "LayerNorm"),
        ("dropout", "Dropout"),
    ),
)
