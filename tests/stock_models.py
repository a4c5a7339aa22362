"""Small stock models of transformers, of every family that `patch` knows and with every head, and calls of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from small_models import SETTINGS, draw_weights, make_mask
from torch import Tensor

LEGACY = int(transformers.__version__.partition(".")[0]) < 5
BATCH, SEQ_LEN = 3, 11


@dataclass(frozen=True)
class Family:
    """The classes of one family: `prefix` + a head's name; base: the one without a head.

    names: what its configuration calls settings of BERT's; settings: those in which it differs.
    pad: the id of its padding token. token_types: whether it has any.
    attentions: its attention implementations.
    """

    prefix: str
    heads: tuple[str, ...]
    pad: int = 0
    token_types: bool = True
    attentions: tuple[str, ...] = ("sdpa", "eager")
    names: Mapping[str, str] | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all its classes, the base model first."""
        return tuple(self.prefix + head for head in ("Model", *self.heads))


_COMMON = ("ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification")
_COMMON += ("ForQuestionAnswering",)
_ROBERTA = (*_COMMON, "ForCausalLM")
_DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "hidden_act": "activation",
}
FAMILIES = {
    "bert": Family("Bert", (*_COMMON, "LMHeadModel", "ForPreTraining", "ForNextSentencePrediction")),
    "roberta": Family("Roberta", _ROBERTA, pad=1),
    "xlm-roberta": Family("XLMRoberta", _ROBERTA, pad=1, settings={"type_vocab_size": 1}),
    "camembert": Family("Camembert", _ROBERTA, pad=1),
    "electra": Family(
        "Electra",
        (*_COMMON, "ForPreTraining", "ForCausalLM"),
        attentions=("eager",) if LEGACY else ("sdpa", "eager"),
        settings={"embedding_size": 48, "summary_last_dropout": 0.0},
    ),
    "distilbert": Family(
        "DistilBert",
        _COMMON,
        token_types=False,
        names=_DISTILBERT_NAMES,
        settings={"qa_dropout": 0.0, "seq_classif_dropout": 0.0},
    ),
    "mpnet": Family("MPNet", _COMMON, pad=1, token_types=False, attentions=("eager",)),
}
CLASSES = tuple(name for family in FAMILIES.values() for name in family.classes)
PAIRS = tuple((name, attention) for f in FAMILIES.values() for name in f.classes for attention in f.attentions)


def family_of(name: str) -> Family:
    """The family that a class of transformers belongs to."""
    return next(family for family in FAMILIES.values() if name in family.classes)


def config_of(name: str, attention: str | None = None, **settings: Any) -> Any:
    """The configuration of a small model of this class. Settings have BERT's names."""
    family = family_of(name)
    names = family.names or {}
    wanted = {**SETTINGS, "pad_token_id": family.pad, **(family.settings or {}), **settings}
    wanted = {names.get(key, key): value for key, value in wanted.items()}
    kind = getattr(transformers, family.prefix + "Config")
    return kind(**wanted, attn_implementation=attention or family.attentions[0])


def build(
    name: str = "BertModel", attention: str | None = None, dtype: torch.dtype = torch.float64, **settings: Any
) -> Any:
    """A stock model, small, with large weights, in eval mode. Settings have BERT's names."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config_of(name, attention, **settings))
    draw_weights(model)
    return model.to(dtype).eval()


def head_of(name: str) -> str:
    """What comes after the family's prefix: "Model", "ForMaskedLM", ..."""
    return name.removeprefix(family_of(name).prefix)


def mask_of(form: str) -> Tensor | None:
    """A (BATCH, SEQ_LEN) mask: "none", "ones", "right", "left", "holes" or "empty row"."""
    return torch.ones(BATCH, SEQ_LEN, dtype=torch.int64) if form == "ones" else make_mask(form, BATCH, SEQ_LEN)


def call_of(name: str, mask: Tensor | None) -> dict[str, Tensor]:
    """A call of a model of this class, with labels that its head takes, none of them on padding.

    The padding token's id stands at padding, where there is a mask, and at one valid place too.
    """
    torch.manual_seed(1)
    family, head = family_of(name), head_of(name)
    shape = BATCH, SEQ_LEN
    ids = torch.randint(0, SETTINGS["vocab_size"], shape).index_fill(1, torch.tensor([4]), family.pad)
    types = torch.randint(0, (family.settings or {}).get("type_vocab_size", 2), shape)
    call = {"input_ids": ids}
    if family.token_types:
        call["token_type_ids"] = types
    if mask is not None:
        call["attention_mask"] = mask
        call["input_ids"] = ids.masked_fill(mask == 0, family.pad)
    if head == "ForMultipleChoice":  # the batch holds one choice of three
        call = {k: v[None] for k, v in call.items()} | {"labels": torch.tensor([1])}
    tokens = torch.randint(0, 2, shape)
    if head in ("ForMaskedLM", "LMHeadModel", "ForCausalLM", "ForTokenClassification", "ForPreTraining"):
        call["labels"] = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    if name == "ElectraForPreTraining":  # which is told apart by its mask
        call["labels"] = tokens
    if name == "BertForPreTraining":
        call["next_sentence_label"] = torch.tensor([0, 1, 1])
    if head in ("ForNextSentencePrediction", "ForSequenceClassification"):
        call["labels"] = torch.tensor([0, 1, 1])
    if head == "ForQuestionAnswering":
        call["start_positions"] = call["end_positions"] = torch.tensor([0, 3, 2])
    return call
