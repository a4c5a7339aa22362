"""Random small models of transformers, of every family and with every head, and random calls of them, for hypothesis.

What hypothesis draws are the shapes and the choices, so that it can shrink them; numbers come from a seed.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from agreement import reads_all, reads_first
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from small_models import SETTINGS
from stock_models import CLASSES, build, family_of, head_of
from torch import Tensor

from bertfast.architectures import parameters_of

ACTIVATIONS = ("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
OTHER_ACTIVATIONS = ("relu", "silu")
MASK_DTYPES = (torch.int64, torch.bool, torch.float32, torch.int32, torch.uint8)
LONGEST = 40
_FORMS = ("right", "left", "holes", "full", "empty")
_BY_TOKEN = ("ForMaskedLM", "ForTokenClassification", "LMHeadModel", "ForCausalLM")
_LABELS_BY_TOKEN = (*_BY_TOKEN, "ForPreTraining")


def examples(n: int) -> settings:
    """Settings of a property: n examples, and the means to repeat the one that fails."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=n, deadline=None, print_blob=True, database=None, suppress_health_check=slow)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors, or tuples of them, are the same to the bit, NaN and all."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    raw = [t.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def assert_same_bits(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """The same names, and the same bits under each."""
    assert list(ours) == list(theirs)
    assert not [name for name in theirs if not same_bits(ours[name], theirs[name])]


@dataclass(frozen=True)
class Subject:
    """A model: the class, its attention implementation, and settings under BERT's names."""

    name: str
    attention: str
    settings: Mapping[str, Any]

    def build(self, dtype: torch.dtype) -> Any:
        """The stock model, with large weights, in eval mode."""
        return build(self.name, self.attention, dtype, **self.settings)


@dataclass(frozen=True)
class Call:
    """A call of a model.

    rows: the form of each sequence's mask and how long it is (the seed of "holes"); None calls without a mask.
    tokens: "ids", "int32" or "embeds". types, positions: None, "each", or "one row" for all sequences.
    labels: "none", "valid" (none on padding) or "anywhere". extra: more arguments.
    """

    seed: int
    batch: int
    seq_len: int
    rows: tuple[tuple[str, int], ...] | None = None
    mask_dtype: torch.dtype = torch.int64
    tokens: str = "ids"
    types: str | None = None
    positions: str | None = None
    labels: str = "none"
    extra: tuple[tuple[str, bool], ...] = ()

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """(batch, seq_len) int64, 1 at valid tokens."""
        if self.rows is None:
            return None
        columns, mask = torch.arange(self.seq_len), torch.zeros(self.batch, self.seq_len, dtype=torch.int64)
        for row, (form, n) in zip(mask, self.rows, strict=True):
            if form == "holes":
                row.copy_(torch.randint(0, 2, row.shape, generator=torch.Generator().manual_seed(n)))
            elif form != "empty":
                length = self.seq_len if form == "full" else n
                row.copy_(columns >= self.seq_len - length if form == "left" else columns < length)
        return mask

    @property
    def is_padded(self) -> bool:
        """Whether there is any padding."""
        return self.mask is not None and not bool(self.mask.all())

    def arguments(self, subject: Subject, dtype: torch.dtype) -> dict[str, Any]:
        """The keyword arguments, for a model of this dtype."""
        draw = torch.Generator().manual_seed(self.seed)
        shape, family, head = (self.batch, self.seq_len), family_of(subject.name), head_of(subject.name)

        def integers(high: int, size: tuple[int, ...] = shape) -> Tensor:
            return torch.randint(0, high, size, generator=draw)

        call: dict[str, Any] = {"input_ids": integers(SETTINGS["vocab_size"])}
        if self.tokens == "int32":
            call["input_ids"] = call["input_ids"].int()
        elif self.tokens == "embeds":
            width = subject.settings.get("embedding_size", subject.settings["hidden_size"])
            call = {"inputs_embeds": torch.randn(*shape, width, generator=draw).to(dtype)}
        sizes = {"each": shape, "one row": (1, self.seq_len)}
        if self.types and family.token_types:
            call["token_type_ids"] = integers((family.settings or {}).get("type_vocab_size", 2))
        takes = parameters_of(getattr(transformers, subject.name))
        # DistilBERT's multiple choice does not flatten them, and fails.
        if self.positions and "position_ids" in takes and subject.name != "DistilBertForMultipleChoice":
            call["position_ids"] = integers(LONGEST, sizes["each" if _by_choice(subject) else self.positions])
        if self.mask is not None:
            call["attention_mask"] = self.mask.to(self.mask_dtype)
        if _by_choice(subject):
            call = {name: value.unflatten(0, (self._questions, -1)) for name, value in call.items()}
        if self.labels != "none":
            call |= self._labels(subject.name, head, integers)
        return call | dict(self.extra)

    @property
    def _questions(self) -> int:
        return 1 if self.batch % 2 else self.batch // 2

    def _labels(self, name: str, head: str, integers: Any) -> dict[str, Tensor]:
        if name == "ElectraForPreTraining":  # which tells padding from its mask
            return {"labels": integers(2)}
        if head in _LABELS_BY_TOKEN:
            labels = integers(2)
            if self.mask is not None and self.labels == "valid":
                labels = labels.masked_fill(self.mask == 0, -100)
            both = {"next_sentence_label": integers(2, (self.batch,))} if head == "ForPreTraining" else {}
            return {"labels": labels} | both
        if head == "ForMultipleChoice":
            return {"labels": integers(self.batch // self._questions, (self._questions,))}
        if head in ("ForSequenceClassification", "ForNextSentencePrediction"):
            return {"labels": integers(2, (self.batch,))}
        if head == "ForQuestionAnswering":
            names = ("start_positions", "end_positions")
            return {name: integers(self.seq_len, (self.batch,)) for name in names}
        return {}


def _by_choice(subject: Subject) -> bool:
    return subject.name.endswith("ForMultipleChoice")


def path_of(subject: Subject, call: Call, padding: str) -> str:
    """The path that a call of a patched model promises to run. One without layers is counted as "stock"."""
    wanted, layers = dict(call.extra), subject.settings["num_hidden_layers"]
    if wanted.get("output_attentions") or (layers and subject.settings["hidden_act"] not in ACTIVATIONS):
        return "stock"
    if wanted.get("output_hidden_states"):
        return "rectangle"
    if not call.is_padded:
        return "packed"
    mask = call.mask
    begins = (mask.diff(dim=1, prepend=mask.new_zeros(len(mask), 1)) == 1).sum(1)
    if subject.name.startswith("MPNet") and bool((begins > 1).any()):  # a bias by distance, in columns
        return "rectangle"
    if padding == "drop":
        return "packed" if mask.any() else "rectangle"
    if (
        not mask.any(1).all()
        or reads_all(subject.name)
        or (reads_first(subject.name) and not mask[:, 0].all())
        or _labels_on_padding(subject, call)
    ):
        return "rectangle"
    return "packed"


def _labels_on_padding(subject: Subject, call: Call) -> bool:
    by_token = head_of(subject.name) in _LABELS_BY_TOKEN and subject.name != "ElectraForPreTraining"
    return by_token and call.labels == "anywhere" and call.is_padded


def promised(subject: Subject, call: Call, padding: str, output: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """The tensors of an output that have to be stock's: all of them, but without padding in a packed call.

    padding="drop" also gives up what a head of stock's makes of padding.
    """
    tensors = {}
    for name, value in output.items():
        several = isinstance(value, tuple)
        tensors.update({f"{name}.{i}": v for i, v in enumerate(value)} if several else {name: value})
    if path != "packed" or not call.is_padded:
        return tensors
    head = head_of(subject.name)
    by_token = {"last_hidden_state", "prediction_logits", "start_logits", "end_logits"}
    by_token |= {"logits"} if head in _BY_TOKEN or subject.name == "ElectraForPreTraining" else set()
    if padding == "drop":
        unlike = set()
        if reads_all(subject.name) or _labels_on_padding(subject, call):
            unlike.add("loss")
        if reads_first(subject.name) and not call.mask[:, 0].all():
            unlike |= {"loss", *tensors} - by_token
        tensors = {name: value for name, value in tensors.items() if name not in unlike}
    valid = call.mask.bool()
    return {name: value[valid] if name in by_token else value for name, value in tensors.items()}


@st.composite
def subjects(draw: st.DrawFn, names: tuple[str, ...] = CLASSES, *, fused: bool = True) -> Subject:
    """A model. fused: only such as the fused ops can compute."""
    name = draw(st.sampled_from(names))
    heads = draw(st.integers(1, 3))
    settings: dict[str, Any] = {
        "hidden_size": heads * draw(st.integers(8, 64)),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1 if fused else 0, 3)),
        "intermediate_size": draw(st.integers(1, 80)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS if fused else ACTIVATIONS + OTHER_ACTIVATIONS)),
        "max_position_embeddings": LONGEST + 4,  # RoBERTa's positions begin behind its padding token's id
    }
    if name.startswith("Electra"):
        settings["embedding_size"] = draw(st.sampled_from((settings["hidden_size"], 24)))
    return Subject(name, draw(st.sampled_from(family_of(name).attentions)), settings)


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    forms: tuple[str, ...] = ("none", *_FORMS, "mixed"),
    extra: tuple[str, ...] = (),
    labels: tuple[str, ...] = ("none", "valid", "anywhere"),
) -> Call:
    """A call. forms: of its mask; "mixed" draws one for each sequence. extra: switches that may be on."""
    batch, seq_len = draw(st.integers(1, 4)), draw(st.integers(1, LONGEST))
    form, rows = draw(st.sampled_from(forms)), None
    if form != "none":
        each = st.sampled_from(_FORMS) if form == "mixed" else st.just(form)
        rows = tuple(draw(st.tuples(each, st.integers(1, seq_len))) for _ in range(batch))
    return Call(
        draw(st.integers(0, 2**16)),
        batch,
        seq_len,
        rows,
        draw(st.sampled_from(MASK_DTYPES)),
        draw(st.sampled_from(("ids", "int32", "embeds"))),
        draw(st.sampled_from((None, "each"))),
        draw(st.sampled_from((None, "each", "one row"))),
        draw(st.sampled_from(labels)),
        draw(st.sampled_from(((), *(((name, True),) for name in extra)))),
    )


def other_padding(subject: Subject, call: Call, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with other ids, types, positions and vectors at padding positions.

    A padding token's id stays one and no other becomes one: RoBERTa's positions count these, whatever the mask says.
    """
    pad, padded = family_of(subject.name).pad, call.mask == 0
    if _by_choice(subject):
        padded = padded.unflatten(0, (call._questions, -1))
    changed = dict(arguments)
    for name in ("input_ids", "token_type_ids", "position_ids", "inputs_embeds"):
        value = arguments.get(name)
        if value is None or value.shape[0] != padded.shape[0]:  # one row of positions for all sequences
            continue
        if name == "inputs_embeds":
            changed[name] = value.masked_fill(padded[..., None], 1e4)
        elif name == "input_ids":
            other = torch.where(value == pad, pad, torch.where(value == pad + 2, pad + 3, pad + 2))
            changed[name] = torch.where(padded, other, value).to(value.dtype)
        else:
            changed[name] = torch.where(padded, (value + 1) % (value.max() + 1), value)
    return changed
