"""Peers made ready to run: each in each precision, once for a model, and what came of those that cannot."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from benchmarks.peers import Peer, Setting, Unavailable
from benchmarks.results import OUT_OF_TIME
from benchmarks.workloads import Batch

# They are compiled for the shape of the batch that they are made ready with, and are another thing after a second one.
_OF_ONE_SHAPE = ("compile", "compile-max-autotune")


class Ready(NamedTuple):
    """What computes a batch."""

    run: Callable[[Batch], Tensor]
    seconds: float  # that it took to prepare


class Refused(NamedTuple):
    """Why there is nothing to run. status: "skipped" where that was to be expected, "failed" where not."""

    status: str
    reason: str


class Contenders:
    """Prepares peers on demand, for one model at a time.

    allowance: seconds after which no more is prepared, but for the peers that have to be there.
    """

    def __init__(self, device: str, threads: int, allowance: float = float("inf"), needed: Sequence[str] = ()) -> None:
        self._device, self._threads = device, threads
        self._allowance, self._needed = allowance, tuple(needed)
        self._known: dict[tuple[str, str], Ready | Refused] = {}
        self._model: nn.Module | None = None

    def setting(self, model: nn.Module, head: str, precision: str, batch: Batch) -> Setting:
        """What a peer is told."""
        return Setting(model, head, precision, self._device, batch, self._threads)

    def get(self, peer: Peer, model: nn.Module, head: str, precision: str, batch: Batch) -> Ready | Refused:
        """The peer, from before where the model is that of the last call and the peer does not mind the shape."""
        if model is not self._model:
            self._known, self._model = {}, model
        key = (peer.name, precision)
        known = self._known.get(key)
        if known is None or (isinstance(known, Ready) and peer.name in _OF_ONE_SHAPE):
            known = self._known[key] = self.attempt(
                peer, lambda: peer.prepare(self.setting(model, head, precision, batch))
            )
        return known

    def attempt(self, peer: Peer, prepare: Callable[[], Any]) -> Ready | Refused:
        """What prepare() returns, and how long that took; or why not."""
        if self._device not in peer.devices:
            return Refused("skipped", f"runs on {' and '.join(peer.devices)} only")
        if self._allowance <= 0 and peer.name not in self._needed:
            return Refused("skipped", f"the time for preparing is used up: {OUT_OF_TIME}, or name fewer peers")
        begin = time.perf_counter()
        try:
            return Ready(prepare(), time.perf_counter() - begin)
        except Unavailable as error:
            return Refused("skipped", one_line(error))
        except Exception as error:
            return Refused("failed", f"{type(error).__name__}: {one_line(error)}")
        finally:
            self._allowance -= time.perf_counter() - begin

    def forget(self) -> None:
        """Let go of everything that was prepared."""
        self._known, self._model = {}, None


def one_line(error: Exception) -> str:
    """The message without line breaks, cut where it goes on and on."""
    return " ".join(str(error).split())[:300]
