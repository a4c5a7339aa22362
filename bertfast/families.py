"""Where each model family of transformers keeps what `patch` needs: classes, submodules, heads. Data, and its look-up.

Nothing here imports transformers: classes are recognised by the module and the name they were defined with, so that
a process which never loaded transformers does not pay for it.
"""

import functools
import inspect
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Role = Literal["model", "embeddings", "encoder", "layer"]
# When a task model's head reads, or shows, what stands at padding positions: always, or where a label stands on one.
Reads = Literal["always", "labels"]


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture that computes what BERT does, and what its parts are called in transformers.

    module: where its classes are defined.
    model, embeddings, encoder, layer: the classes, recognised exactly: a subclass may compute something else.
    prefix: the attribute of a task model that holds the base model; pooler: the base model's, which reads position 0.
    heads: the task models that read padding in other ways than through the pooler. Their subclasses are included.
    layer_places: from the layer, the paths of the query, key and value, attention dense, up and down `nn.Linear`, of
        the two `nn.LayerNorm` and of the three `nn.Dropout`. embedding_places: the same for the embeddings.
    containers: the classes that may stand on these paths, for both.
    activation: path of the activation, a module or a function.
    """

    module: str
    model: str
    embeddings: str
    encoder: str
    layer: str
    encoder_output: str
    prefix: str
    pooler: str
    heads: dict[str, Reads]
    layer_places: dict[str, str]
    embedding_places: dict[str, str]
    containers: dict[str, tuple[str, ...]]
    activation: str

    def __reduce__(self) -> tuple:
        """Copies are the family itself, pickles its name, so that a later version of bertfast reads its own data."""
        return _family, (self.module,)


BERT = Family(
    module="transformers.models.bert.modeling_bert",
    model="BertModel",
    embeddings="BertEmbeddings",
    encoder="BertEncoder",
    layer="BertLayer",
    encoder_output="BaseModelOutputWithPastAndCrossAttentions",
    prefix="bert",
    pooler="pooler",
    heads={
        "BertForQuestionAnswering": "always",  # a softmax over all positions
        "BertLMHeadModel": "always",  # its loss sets the labels against the logits of the position before
        "BertForMaskedLM": "labels",
        "BertForPreTraining": "labels",
        "BertForTokenClassification": "labels",
    },
    layer_places={
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_dense": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "output_norm": "output.LayerNorm",
        "attention_dropout": "attention.self.dropout",
        "attention_output_dropout": "attention.output.dropout",
        "output_dropout": "output.dropout",
    },
    embedding_places={
        "word": "word_embeddings",
        "position": "position_embeddings",
        "token_type": "token_type_embeddings",
        "norm": "LayerNorm",
        "dropout": "dropout",
    },
    containers={
        "attention": ("BertAttention",),
        "attention.self": ("BertSelfAttention", "BertSdpaSelfAttention"),
        "attention.output": ("BertSelfOutput",),
        "intermediate": ("BertIntermediate",),
        "output": ("BertOutput",),
    },
    activation="intermediate.intermediate_act_fn",
)
FAMILIES = (BERT,)


def _family(module: str) -> Family:
    return next(family for family in FAMILIES if family.module == module)


# What has to stand at a place, by the last word of the place's name.
KINDS: dict[str, type[nn.Module]] = {
    "query": nn.Linear,
    "key": nn.Linear,
    "value": nn.Linear,
    "dense": nn.Linear,
    "up": nn.Linear,
    "down": nn.Linear,
    "norm": nn.LayerNorm,
    "dropout": nn.Dropout,
    "word": nn.Embedding,
    "position": nn.Embedding,
    "type": nn.Embedding,
}

# The classes in transformers.activations that `linear` has an equal for.
_ACTIVATION_CLASSES = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
}


@functools.cache
def role_of(kind: type) -> tuple[Family, Role] | None:
    """The family and the part in it that a class is, exactly; None for every other class."""
    for family in FAMILIES:
        if kind.__module__ == family.module:
            for role in ("model", "embeddings", "encoder", "layer"):
                if kind.__qualname__ == getattr(family, role):
                    return family, role
    return None


@functools.cache
def head_of(kind: type) -> tuple[Family, Reads] | None:
    """The family of a task model whose head reads padding, and when it does; None for every other class."""
    for base in kind.__mro__:
        for family in FAMILIES:
            if base.__module__ == family.module and base.__qualname__ in family.heads:
                return family, family.heads[base.__qualname__]
    return None


def stock_class(kind: type) -> type:
    """The class as transformers defines it, of one that may be derived from it; `kind` itself where there is none."""
    return next((base for base in kind.__mro__ if role_of(base) is not None), kind)


@functools.cache
def is_legacy(family: Family) -> bool:
    """Whether the family's layers are transformers 4's, which take a head mask and return tuples."""
    layer = getattr(sys.modules[family.module], family.layer)
    return "head_mask" in inspect.signature(layer.forward).parameters


@functools.cache
def _activation_class(kind: type) -> str | None:
    return _ACTIVATION_CLASSES.get(kind.__qualname__) if kind.__module__ == "transformers.activations" else None


def activation_of(function: object) -> str | None:
    """What `bertfast.ops.linear` calls this activation (a module or a function); None where it has no equal."""
    if function is torch.nn.functional.gelu:
        return "gelu"
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return _activation_class(type(function))
