"""Stock models of transformers, for the commands that compare with them, and how far outputs are apart."""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bertfast.architectures import parameters_of
from bertfast.cli.files import check_model
from bertfast.cli.tokens import load
from bertfast.patching import explain, patch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Batch = dict[str, Tensor]


def load_stock(model: str, dtype: torch.dtype) -> nn.Module:
    """The checkpoint as the class of transformers that it was saved from, in evaluation mode."""
    check_model(model)

    def from_pretrained(transformers: Any) -> nn.Module:
        names = transformers.AutoConfig.from_pretrained(model).architectures or []
        found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        kind = found[0] if found else transformers.AutoModel
        return kind.from_pretrained(model, dtype=torch.float32)

    return load(from_pretrained, model).to(dtype).eval()


def positions(stock: Any) -> int:
    """How many tokens a sequence can have. RoBERTa's table keeps the rows up to that of the padding for itself."""
    for name, module in stock.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return stock.config.max_position_embeddings


def forward(model: nn.Module, batch: Batch, **options: Any) -> dict[str, Any]:
    """The model's outputs by name. Multiple-choice models get every text as the one choice of a question.

    Models that know fewer than two token types are not told any.
    """
    if "token_type_ids" not in parameters_of(type(model)) or getattr(model.config, "type_vocab_size", 0) < 2:
        batch = {k: t for k, t in batch.items() if k != "token_type_ids"}
    if type(model).__name__.endswith("ForMultipleChoice"):
        batch = {k: t[:, None] for k, t in batch.items()}
    with torch.inference_mode():
        return dict(model(**batch, return_dict=True, **options))


_CALL_KINDS = {"packed": "packed", "rectangle": "fused on the padded rectangle", "stock": "on stock code"}


@dataclass(frozen=True)
class Calls:
    """How many calls of a patched model ran how, and why not packed."""

    kinds: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, model: nn.Module) -> "Calls":
        """All calls since it was patched."""
        kinds: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for backbone in explain(model).backbones:
            kinds.update(backbone.calls)
            reasons.update(backbone.reasons)
        return cls(kinds, reasons)

    def __add__(self, other: "Calls") -> "Calls":
        return Calls(self.kinds + other.kinds, self.reasons + other.reasons)

    def __sub__(self, other: "Calls") -> "Calls":
        return Calls(self.kinds - other.kinds, self.reasons - other.reasons)

    def to_dict(self) -> dict[str, dict[str, int]]:
        return {"calls": {kind: self.kinds[kind] for kind in _CALL_KINDS}, "not_packed": dict(self.reasons)}

    def __str__(self) -> str:
        return ", ".join(f"{self.kinds[kind]} {words}" for kind, words in _CALL_KINDS.items())


@dataclass
class Difference:
    """How far one model's output is from another's: the largest and the mean absolute difference."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, actual: Tensor, gold: Tensor) -> None:
        if gold.numel() == 0:
            return
        error = (actual.double() - gold).abs()
        # NaN is as wrong as can be, and max() of Python floats would lose it.
        self.largest = max(self.largest, float(error.max().nan_to_num(torch.inf)))
        self.total += float(error.sum())
        self.count += error.numel()

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)


@dataclass
class Row:
    """One output of the model: what stock code gets wrong in the dtype, and what the patched model does."""

    stock: Difference = field(default_factory=Difference)
    patched: Difference = field(default_factory=Difference)
    magnitude: float = 0.0  # of the largest value

    def limit(self, dtype: torch.dtype) -> float:
        """The largest error that passes: twice stock's own, and at least what rounding alone can do.

        That is 2e-5 in float32, and in half precision one unit in the last place of the largest value: where few
        numbers are compared, stock's own error may be next to nothing by luck.
        """
        floor = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * self.magnitude
        return max(floor, 2 * self.stock.largest)


class Comparison:
    """Stock and patched model against the gold one, output by output, over as many batches as `add` is given.

    The gold model is stock code in float64 on the same rounded weights, so that errors are those of computing alone.
    Layers are compared in calls that ask for hidden states, which patched models answer on the padded rectangle;
    everything else in plain calls, as users make them.
    """

    def __init__(self, stock: nn.Module, dtype: torch.dtype, pack_weights: bool = True) -> None:
        self.gold = deepcopy(stock).double()
        self.stock = stock
        self.patched = patch(deepcopy(stock), pack_weights=pack_weights)
        self.dtype = dtype
        self.rows: dict[str, Row] = {}
        self.min_cosine = 1.0
        self.calls = Calls()  # of the patched model, without those that asked for hidden states

    def add(self, batch: Batch) -> None:
        """Compare all outputs on one batch; padding is not looked at."""
        valid = batch["attention_mask"].bool()
        gold = {**_layers(self.gold, batch, valid), **_outputs(self.gold, batch, valid)}
        stock = {**_layers(self.stock, batch, valid), **_outputs(self.stock, batch, valid)}
        layers = _layers(self.patched, batch, valid)
        before = Calls.of(self.patched)
        patched = {**layers, **_outputs(self.patched, batch, valid)}
        self.calls = self.calls + (Calls.of(self.patched) - before)
        for name, tensor in gold.items():
            row = self.rows.setdefault(name, Row())
            row.stock.add(stock[name], tensor)
            row.patched.add(patched[name], tensor)
            row.magnitude = max(row.magnitude, float(tensor.abs().max())) if tensor.numel() else row.magnitude
        lengths = valid.sum(1).tolist()
        theirs, ours = (_means(outputs["last_hidden_state"].double(), lengths) for outputs in (gold, patched))
        self.min_cosine = min(self.min_cosine, float(torch.cosine_similarity(ours, theirs).nan_to_num(-1.0).min()))

    @property
    def ran_fused(self) -> bool:
        """Whether any plain call ran on the fused ops, packed or on the rectangle."""
        return self.calls.kinds["packed"] + self.calls.kinds["rectangle"] > 0

    @property
    def failures(self) -> list[str]:
        """The outputs that are further off than they may be."""
        return [name for name, row in self.rows.items() if not row.patched.largest <= row.limit(self.dtype)]


def _layers(model: Any, batch: Batch, valid: Tensor) -> dict[str, Tensor]:
    """The valid tokens' embeddings and output of each layer."""
    states = forward(model.base_model, batch, output_hidden_states=True)["hidden_states"]
    return {f"layer {i}" if i else "embeddings": state[valid] for i, state in enumerate(states)}


def _outputs(model: Any, batch: Batch, valid: Tensor) -> dict[str, Tensor]:
    """What plain calls give: of the base model, and of the whole model where it has a head; without padding."""
    outputs = forward(model.base_model, batch)
    if model.base_model is not model:
        outputs |= forward(model, batch)
    by_token = ("last_hidden_state", "start_logits", "end_logits")
    return {
        name: value[valid] if name in by_token or value.dim() == 3 else value
        for name, value in outputs.items()
        if isinstance(value, Tensor)
    }


def _means(packed: Tensor, lengths: list[int]) -> Tensor:
    """The mean of each sequence's tokens."""
    return torch.stack([tokens.mean(0) for tokens in packed.split(lengths)])
