"""What is known about a patched model between calls and during one: options, counts, and the frames of this thread."""

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from bertfast.architectures import Family, Reads
from bertfast.eligibility import (
    EmbeddingReading,
    EmbeddingStructure,
    LayerReading,
    LayerStructure,
    Refusal,
    Structure,
)
from bertfast.gate import Stack
from bertfast.guard import Guard
from bertfast.layer import LayerPacks
from bertfast.packing import Packing
from bertfast.runtime.encoder import NativeEncoder

STATE = "_bertfast"  # the only attribute that patching adds to a module


class Snapshot(NamedTuple):
    """What a base model's parts were found to be, see `bertfast.snapshot`, and the facts that this rests on."""

    guard: Guard
    encoder: nn.Module
    config: Any
    layers: Mapping[nn.Module, LayerReading]
    embeddings: nn.Module
    embedding_reading: EmbeddingReading
    native: NativeEncoder

    def is_of(self, encoder: nn.Module, config: Any) -> bool:
        """Whether it was taken of these."""
        return self.encoder is encoder and self.config is config

    @property
    def weight(self) -> Tensor:
        """A weight of the first layer, of which all are the same kind."""
        return next(iter(self.layers.values())).parameters.up_weight


@dataclass
class BackboneState:
    """What patching keeps on a base model, its encoder and its embeddings: options and counts of calls.

    operand: what the GEMMs of inference on the CPU multiply, where that is not what the weights are. pooled: whether
    the model has a pooler. reads: what the task model's head around it reads at padding positions.
    Copies and pickles keep the options and start counting anew.
    """

    family: Family
    padding: str = "exact"
    pack_weights: bool = True
    operand: str | None = None
    pooled: bool = False
    reads: Reads | None = None
    handles: list = field(default_factory=list)
    calls: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    structure: EmbeddingStructure | None = None
    snapshot: Snapshot | None = None

    def __getstate__(self) -> dict:
        empty = {"calls": Counter(), "reasons": Counter(), "structure": None, "snapshot": None}
        return {**self.__dict__, **empty}


@dataclass
class LayerState:
    """What patching keeps on a layer: the packed weights and where its modules are. Copies and pickles are empty."""

    family: Family
    packs: LayerPacks
    structure: LayerStructure | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "structure": None}


@dataclass
class HeadState:
    """What patching keeps on a task model. output_logits: whether it returns words' scores when it is given labels."""

    family: Family
    reads: Reads
    output_logits: bool = True
    handles: list = field(default_factory=list)


@dataclass(frozen=True)
class Ticket:
    """Goes to a layer in the mask's place: the tokens are packed like this; the mask is what stock code would take.

    bias: what is added to the attention scores of a sequence, (1, heads, max_seqlen, max_seqlen), if anything.
    snapshot: of the base model at the call's beginning, where there is one.
    """

    packing: Packing
    mask: Tensor | None
    bias: Tensor | None = None
    snapshot: Snapshot | None = None


@dataclass
class HeadCall:
    """One call of a task model.

    packing: of the rectangle, where what stands at padding is not to be looked at. words: the loss that is wanted in
    place of words' scores, see `bertfast.word_loss`.
    """

    model: nn.Module
    base: nn.Module
    labels: Tensor | None = None
    packing: Packing | None = None
    words: Any = None


class Frame:
    """One call of a base model, or of an encoder alone. packing is None where the call runs on the rectangle."""

    __slots__ = ("encoder", "fused", "model", "native", "packing", "reasons", "rectangle", "snapshot")

    def __init__(self, model: nn.Module | None, encoder: nn.Module) -> None:
        self.model = model
        self.encoder = encoder
        self.packing: Packing | None = None
        self.rectangle: str | None = None  # why the call is not packed
        self.reasons: set[str] = set()  # why parts of the call ran stock code
        self.fused = False
        self.native = False  # whether the layers ran in one native call
        self.snapshot: Snapshot | None = None  # of the base model, where it holds


class _Calls(threading.local):
    """The calls under way in this thread: threads may share a model, so nothing of a call is kept on the model."""

    def __init__(self) -> None:
        self.frames = Stack()  # of Frame
        self.heads = Stack()  # of HeadCall


calls = _Calls()


def structure_of(owner: nn.Module, state: Any, kind: type[Structure]) -> Any:
    """The verified modules of `owner`, found anew where they have changed; or the refusal."""
    found = state.structure
    if found is not None and found.owner is owner and found.is_current():
        return found
    try:
        found = kind(owner, state.family)
    except LookupError as error:
        return Refusal(error.args[0])
    # DataParallel's replicas share the original's state, but not its modules.
    if not getattr(owner, "_is_replica", False):
        state.structure = found
    return found


def count(state: BackboneState, frame: Frame) -> None:
    """Add a call that has come through its encoder to the counts. A call is stock if no layer ran the fused ops."""
    kind = "stock" if not frame.fused else "rectangle" if frame.packing is None else "packed"
    state.calls[kind] += 1
    state.calls["native"] += frame.native
    for reason in frame.reasons if frame.rectangle is None else {frame.rectangle, *frame.reasons}:
        state.reasons[reason] += 1
