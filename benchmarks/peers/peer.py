"""What a peer is: an engine that computes the same as a stock model, made ready by its adapter in a few lines.

An adapter refuses with Unavailable where its engine is not installed or does not take the model; whatever else it
raises is the engine's own failure.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

Batch = dict[str, Tensor]
Run = Callable[[Batch], Tensor]


class Unavailable(Exception):
    """One line: why a peer cannot run here, or cannot take this model."""


class Setting(NamedTuple):
    """What a peer is prepared for.

    model: the stock model, float32, in evaluation mode, on the CPU; no peer modifies it. head: "" where the last hidden
    state is wanted, otherwise the logits are. precision: a word of Peer.precisions. device: "cpu" or "cuda". batch: one
    that will be run, to trace, compile, calibrate or export with. threads: for engines that have threads of their own;
    PyTorch's are set by whoever times.
    """

    model: nn.Module
    head: str
    precision: str
    device: str
    batch: Batch
    threads: int


class Peer(NamedTuple):
    """An engine under the name that results carry, with what it can run in and on.

    prepare: does everything slow once and returns what computes a batch, given on the setting's device, to (sequences,
    longest, hidden) or to the logits; what stands at padding positions is nobody's business. Raises Unavailable.
    trainable: a copy of the model in training mode on the setting's device, with float32 parameters of its own, to be
    called like the model; None for engines that do not train. Raises Unavailable.
    """

    name: str
    precisions: tuple[str, ...]
    devices: tuple[str, ...]
    prepare: Callable[[Setting], Run]
    trainable: Callable[[Setting], Callable[..., Any]] | None = None

    @property
    def training(self) -> bool:
        """Whether it can stand in a training step."""
        return self.trainable is not None


def imported(name: str, package: str = "") -> ModuleType:
    """The module of this name. Unavailable where it is not installed or cannot be loaded; package: as pip calls it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        package = package or name.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and (error.name or name).startswith(name.partition(".")[0]):
            raise Unavailable(f"{package} is not installed") from error
        raise Unavailable(f"{package} cannot be loaded: {str(error).splitlines()[0]}") from error


def only_encoder(setting: Setting, engine: str) -> None:
    """Unavailable where the logits of a head are wanted."""
    if setting.head:
        raise Unavailable(f"{engine} runs the encoder only, not a {setting.head} head")


def only_type(setting: Setting, engine: str, wanted: str = "bert") -> None:
    """Unavailable where the model is not of this type of transformers' configurations."""
    found = getattr(getattr(setting.model, "config", None), "model_type", None)
    if found != wanted:
        raise Unavailable(
            f"{engine} takes models of type {wanted!r} here, not {found or type(setting.model).__name__!r}"
        )


def wanted(output: Any, head: str) -> Tensor:
    """What is compared and timed of a transformers output."""
    return output.logits if head else output.last_hidden_state
