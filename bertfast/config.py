"""BertConfig: the sizes and settings of a BERT, under Hugging Face's names and with its defaults."""

import json
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any

from bertfast.layer import ACTIVATIONS

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size"),
)
# What the other fields may be, and in words.
_NUMBER, _NAMES = ((float, int), "a number"), ((dict, type(None)), "a mapping or None")
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), _NUMBER),
    **dict.fromkeys(("initializer_range", "layer_norm_eps"), _NUMBER),
    **dict.fromkeys(("id2label", "label2id"), _NAMES),
    "classifier_dropout": ((float, int, type(None)), "a number or None"),
    "tie_word_embeddings": ((bool, type(None)), "true or false"),
    "pad_token_id": ((int, type(None)), "an integer or None"),
    "hidden_act": (str, "a name"),
    "extra": (dict, "a mapping"),
}
# Settings of config.json that change what is computed, and the values at which bertfast computes the same.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}


@dataclass
class BertConfig:
    """The settings of a BERT. Every field has Hugging Face's name, meaning and default.

    num_labels is the length of id2label: setting the number names the labels LABEL_0, LABEL_1, ..., setting the names
    sets the number. extra holds everything else that a config.json said; `to_dict` writes it back.

    Raises ValueError for a value of another kind than its field's, for sizes that do not fit one another and for
    settings that are not BERT's encoder.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    problem_type: str | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    num_labels: InitVar[int | None] = None  # becomes the property below

    def __post_init__(self, num_labels: int | None) -> None:
        self._check_kinds(num_labels)
        if self.id2label is None:
            self.id2label, given = _label_names(2 if num_labels is None else num_labels), None
        else:
            self.id2label, given = {int(i): name for i, name in self.id2label.items()}, num_labels
        if given is not None and given != len(self.id2label):
            raise ValueError(f"num_labels is {given}, but id2label names {len(self.id2label)} labels: give one of them")
        if self.label2id is None:
            self.label2id = {name: i for i, name in self.id2label.items()}
        self._check()

    def _check_kinds(self, num_labels: int | None) -> None:
        if num_labels is not None and (not isinstance(num_labels, int) or num_labels < 0):
            raise ValueError(f"num_labels must be an integer of at least 0, not {num_labels!r}")
        for name, (kind, said) in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ValueError(f"{name} must be {said}, not {value!r}")

    def _check(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < (0 if name == "num_hidden_layers" else 1):
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        for name in ("layer_norm_eps", "initializer_range"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, not {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, not {self.hidden_act!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), not {value}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, not {self.problem_type!r}")
        for name, neutral in _NEUTRAL.items():
            if name in self.extra and self.extra[name] not in neutral:
                raise ValueError(
                    f"{name} is {self.extra[name]!r}: bertfast's own classes are BERT's bidirectional encoder with "
                    "absolute positions; run this model with transformers"
                )

    @property
    def classifier_dropout_prob(self) -> float:
        """The dropout before a classifier: classifier_dropout, or hidden_dropout_prob where that is None."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @classmethod
    def base(cls, **changes: Any) -> "BertConfig":
        """BERT-base of Devlin et al. 2019: 12 layers of 768, 12 heads, 110 M parameters."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes: Any) -> "BertConfig":
        """BERT-large of Devlin et al. 2019: 24 layers of 1024, 16 heads, 340 M parameters."""
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        return cls(**{**sizes, **changes})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "BertConfig":
        """The config that a config.json holds. Keys without a field are kept in `extra`.

        Raises ValueError for another model_type than "bert" and where the settings do not fit.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"the settings must be a mapping, not a {type(settings).__name__}")
        settings = dict(settings)
        model_type = settings.pop("model_type", "bert")
        if model_type != "bert":
            raise ValueError(
                f"model_type is {model_type!r}: bertfast's own classes are BERT; "
                "load this model with transformers and see what bertfast.patch does for it"
            )
        known = {f.name for f in fields(cls) if f.name != "extra"} | {"num_labels"}
        extra = {k: settings.pop(k) for k in list(settings) if k not in known}
        return cls(**settings, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The settings as config.json holds them: what `from_dict` takes, and what transformers takes."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {**self.extra, **known, "model_type": "bert"}

    @classmethod
    def from_json(cls, path: str | Path) -> "BertConfig":
        """The config in this file. Raises OSError, json.JSONDecodeError, and as `from_dict`."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def with_changes(self, **changes: Any) -> "BertConfig":
        """A copy with some fields changed. Raises TypeError for a name that is no field."""
        known = {f.name for f in fields(self)} | {"num_labels"}
        if unknown := sorted(changes.keys() - known):
            raise TypeError(f"BertConfig has no field {', '.join(unknown)}: it has {', '.join(sorted(known))}")
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        new_labels = changes.get("num_labels", self.num_labels) != self.num_labels
        if new_labels or "id2label" in changes:  # the other label fields described the labels of before
            settings.update(id2label=None, label2id=None)
        return type(self)(**{**settings, **changes})


def _label_names(count: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(count)}


def _num_labels(self: BertConfig) -> int:
    """How many labels a classifier tells apart: the length of id2label."""
    return len(self.id2label or {})


def _set_num_labels(self: BertConfig, count: int) -> None:
    if count != len(self.id2label or {}):
        self.id2label = _label_names(count)
        self.label2id = {name: i for i, name in self.id2label.items()}


# After the decorator has run: inside the class body the property would be the constructor's default.
BertConfig.num_labels = property(_num_labels, _set_num_labels)  # type: ignore[assignment, misc]
