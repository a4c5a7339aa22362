"""Where each model family of transformers keeps what `patch` needs: classes, submodules, heads. Data, and its look-up.

Nothing here imports transformers: classes are recognised by the module and the name they were defined with, so that
a process which never loaded transformers does not pay for it.
"""

import functools
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from bertfast.errors import UnsupportedModelError

Role = Literal["model", "embeddings", "encoder", "layer"]
ROLES: tuple[Role, ...] = ("model", "embeddings", "encoder", "layer")
# What the head of a task model does with padding positions, and with sequences:
#   tokens   computes token by token, and looks at no padding     labels   the same, but a label may stand on padding
#   pooler   reads what the base model pooled                     first    reads position 0 of the hidden states itself
#   summary  reads what its `sequence_summary` says               span     a softmax over all positions of a sequence
#   all      reads all positions in a way of its own
Reads = Literal["tokens", "labels", "pooler", "first", "summary", "span", "all"]


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture that computes what BERT does, and what its parts are called in transformers.

    name: transformers' `model_type`. module: where its classes are defined.
    model, embeddings, encoder, layer: the classes, recognised exactly: a subclass may compute something else.
    prefix: the attribute of a task model that holds the base model.
    heads: the task models, and what their heads read. Their subclasses are included.
    layer_places: from the layer, the paths of the query, key and value, attention dense, up and down `nn.Linear`, of
        the two `nn.LayerNorm` and of the `nn.Dropout` on the probabilities, after the attention (where there is one)
        and after the feed-forward. embedding_places: the same for the embeddings; token types where there are any.
    containers: the classes that may stand on these paths, for both.
    self_attention: path of the container that knows the number of heads, as its attribute `head_count`.
    activation: path of the activation, a module or a function.
    encoder_place, pooler: attributes of the base model; pooler is None where there is none in any version.
    encoder_output: the class of what the encoder returns.
    layer_tail: what a layer that returns a tuple puts behind its hidden states.
    legacy_masks: the dimensions of the smallest mask that its model takes in transformers 4 and does not expand.
    positions: "columns" counts padding; "running" counts tokens other than the padding token, from its id on.
    position_bias: the encoder's method that gives what is added to the attention scores, (1, heads, queries, keys),
        and depends on their distance alone; None where there is no such thing.
    """

    name: str
    module: str
    model: str
    embeddings: str
    encoder: str
    layer: str
    prefix: str
    heads: Mapping[str, Reads]
    layer_places: Mapping[str, str]
    embedding_places: Mapping[str, str]
    containers: Mapping[str, tuple[str, ...]]
    self_attention: str
    activation: str
    encoder_output: str
    encoder_place: str = "encoder"
    pooler: str | None = "pooler"
    head_count: str = "num_attention_heads"
    layer_tail: tuple = (None,)
    legacy_masks: Literal[2, 3] = 3
    positions: Literal["columns", "running"] = "columns"
    position_bias: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.model} of {self.module}, {', '.join(self.heads)}"

    def __reduce__(self) -> tuple:
        """Copies are the family itself, pickles its name, so that a later version of bertfast reads its own data."""
        return _family, (self.name,)


_HEADS: dict[str, Reads] = {
    "ForMaskedLM": "labels",
    "ForTokenClassification": "labels",
    "ForSequenceClassification": "first",
    "ForMultipleChoice": "pooler",
    "ForQuestionAnswering": "span",
}
_EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "token_type": "token_type_embeddings",
    "norm": "LayerNorm",
    "dropout": "dropout",
}
_UNTYPED_EMBEDDINGS = {place: path for place, path in _EMBEDDINGS.items() if place != "token_type"}
_FEED_FORWARD = {
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
    "output_dropout": "output.dropout",
}


def _like_bert(name: str, classes: str, heads: Mapping[str, Reads], **differences: Any) -> Family:
    """A family whose modules are copies of BERT's, under names with another prefix."""
    package = name.replace("-", "_")
    settings = {
        "module": f"transformers.models.{package}.modeling_{package}",
        **{role: classes + role.capitalize() for role in ROLES},
        "prefix": package,
        "layer_places": {
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "attention_dense": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "attention_dropout": "attention.self.dropout",
            "attention_output_dropout": "attention.output.dropout",
            **_FEED_FORWARD,
        },
        "embedding_places": _EMBEDDINGS,
        "containers": {
            "attention": (f"{classes}Attention",),
            "attention.self": (f"{classes}SelfAttention", f"{classes}SdpaSelfAttention"),
            "attention.output": (f"{classes}SelfOutput",),
            "intermediate": (f"{classes}Intermediate",),
            "output": (f"{classes}Output",),
        },
        "self_attention": "attention.self",
        "activation": "intermediate.intermediate_act_fn",
        "encoder_output": "BaseModelOutputWithPastAndCrossAttentions",
    }
    named = {classes + head: reads for head, reads in heads.items()}
    return Family(name=name, heads=named, **(settings | differences))


_ROBERTA_HEADS = _HEADS | {"ForCausalLM": "all"}
BERT = _like_bert(
    "bert",
    "Bert",
    _HEADS
    | {
        "ForSequenceClassification": "pooler",
        "ForNextSentencePrediction": "pooler",
        "ForPreTraining": "labels",
        "LMHeadModel": "all",
    },
)
ROBERTA = _like_bert("roberta", "Roberta", _ROBERTA_HEADS, positions="running")
XLM_ROBERTA = _like_bert("xlm-roberta", "XLMRoberta", _ROBERTA_HEADS, positions="running", prefix="roberta")
CAMEMBERT = _like_bert("camembert", "Camembert", _ROBERTA_HEADS, positions="running", prefix="roberta")
ELECTRA = _like_bert(
    "electra",
    "Electra",
    _HEADS | {"ForMultipleChoice": "summary", "ForPreTraining": "tokens", "ForCausalLM": "all"},
    pooler=None,
)
DISTILBERT = Family(
    name="distilbert",
    module="transformers.models.distilbert.modeling_distilbert",
    model="DistilBertModel",
    embeddings="Embeddings",
    encoder="Transformer",
    layer="TransformerBlock",
    prefix="distilbert",
    heads={f"DistilBert{head}": reads for head, reads in (_HEADS | {"ForMultipleChoice": "first"}).items()},
    layer_places={
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_dense": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "attention_dropout": "attention.dropout",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "output_norm": "output_layer_norm",
        "output_dropout": "ffn.dropout",
    },
    embedding_places=_UNTYPED_EMBEDDINGS,
    containers={
        "attention": ("DistilBertSelfAttention", "MultiHeadSelfAttention", "DistilBertSdpaAttention"),
        "ffn": ("FFN",),
    },
    self_attention="attention",
    activation="ffn.activation",
    encoder_output="BaseModelOutput",
    encoder_place="transformer",
    pooler=None,
    head_count="n_heads",
    layer_tail=(),
    legacy_masks=2,
)
MPNET = Family(
    name="mpnet",
    module="transformers.models.mpnet.modeling_mpnet",
    model="MPNetModel",
    embeddings="MPNetEmbeddings",
    encoder="MPNetEncoder",
    layer="MPNetLayer",
    prefix="mpnet",
    heads={f"MPNet{head}": reads for head, reads in _HEADS.items()},
    layer_places={
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "attention_dense": "attention.attn.o",
        "attention_norm": "attention.LayerNorm",
        "attention_dropout": "attention.attn.dropout",
        "attention_output_dropout": "attention.dropout",
        **_FEED_FORWARD,
    },
    embedding_places=_UNTYPED_EMBEDDINGS,
    containers={
        "attention": ("MPNetAttention",),
        "attention.attn": ("MPNetSelfAttention",),
        "intermediate": ("MPNetIntermediate",),
        "output": ("MPNetOutput",),
    },
    self_attention="attention.attn",
    activation="intermediate.intermediate_act_fn",
    encoder_output="BaseModelOutput",
    layer_tail=(),
    positions="running",
    position_bias="compute_position_bias",
)
_FAMILIES = [BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, ELECTRA, DISTILBERT, MPNET]


def families() -> tuple[Family, ...]:
    """The model families that `patch` knows. `register_family` adds one."""
    return tuple(_FAMILIES)


def register_family(family: Family) -> None:
    """Let `patch` know one more family: an architecture of transformers' or of your own that computes what BERT does.

    A family of the same name is replaced. See `Family` for what it says, and the README for how to check it.
    """
    _FAMILIES[:] = [f for f in _FAMILIES if f.name != family.name] + [family]
    for look_up in (role_of, head_of, stock_class):
        look_up.cache_clear()


def _family(name: str) -> Family:
    for family in _FAMILIES:
        if family.name == name:
            return family
    raise UnsupportedModelError(f"a patched model of the family {name!r}: register_family it before loading")


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
    for family in _FAMILIES:
        if kind.__module__ == family.module:
            for role in ROLES:
                if kind.__qualname__ == getattr(family, role):
                    return family, role
    return None


@functools.cache
def head_of(kind: type) -> tuple[Family, Reads] | None:
    """The family of a task model, and what its head reads; None for every other class."""
    for base in kind.__mro__:
        for family in _FAMILIES:
            if base.__module__ == family.module and base.__qualname__ in family.heads:
                return family, family.heads[base.__qualname__]
    return None


@functools.cache
def stock_class(kind: type) -> type:
    """The class as transformers defines it, of one that may be derived from it; `kind` itself where there is none."""
    return next((base for base in kind.__mro__ if role_of(base) is not None), kind)


@functools.cache
def parameters_of(kind: type) -> dict[str, Any]:
    """The parameters of a class's forward after `self`, in order, with their defaults (None where there is none)."""
    found = list(inspect.signature(kind.forward).parameters.values())[1:]
    named = [p for p in found if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD]
    return {p.name: None if p.default is p.empty else p.default for p in named}


def bind(kind: type, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a class's forward by name, without those that were left out."""
    return {**dict(zip(parameters_of(kind), args, strict=False)), **kwargs}


def _layer_parameters(family: Family) -> dict[str, Any]:
    return parameters_of(getattr(sys.modules[family.module], family.layer))


@functools.cache
def is_legacy(family: Family) -> bool:
    """Whether the family's layers are transformers 4's, which take a head mask."""
    return "head_mask" in _layer_parameters(family)


@functools.cache
def returns_tuples(family: Family) -> bool:
    """Whether layers return tuples, and the encoder what `return_dict` says, as in transformers 4."""
    return "output_attentions" in _layer_parameters(family)


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
