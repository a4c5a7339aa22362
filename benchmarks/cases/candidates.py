"""The ways to compute a case, and what those of one case share: inputs, accuracy, and the peers' times so far."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch

from benchmarks.cases.accuracy import check
from benchmarks.cases.case import Case, Peer
from benchmarks.gpu.timing import input_sets
from bertfast import backend


class Candidate(NamedTuple):
    """One way to compute a case: ours on the backend `name`, or the peer of that name."""

    case: Case
    name: str
    peer: Peer | None

    def within(self) -> AbstractContextManager:
        """What has to be in force while it is prepared and run."""
        return nullcontext() if self.peer is not None else backend.use(self.name)


def candidates(case: Case, backends: Sequence[str], compiled: bool) -> Iterator[Candidate]:
    """The peers first: ours are compared with the best of them. compiled: with PyTorch's operations compiled too."""
    peers = dict(case.peers)
    if compiled and case.compiled is not None:
        peers["compiled"] = Peer(torch.compile(case.compiled, fullgraph=True, dynamic=False))
    for name, peer in peers.items():
        yield Candidate(case, name, peer)
    for name in backends:
        yield Candidate(case, name, None)


class Timed(NamedTuple):
    """What was timed, and its median."""

    call: Callable[[], Any]
    seconds: float


class Group:
    """What the candidates of a case share. seconds: how long each is timed, about."""

    def __init__(self, case: Case, backends: Sequence[str], seconds: float) -> None:
        self.case, self.backends, self.seconds = case, tuple(backends), seconds
        self.peers: dict[str, Timed] = {}  # those that were timed so far

    @cached_property
    def inputs(self) -> list[tuple]:
        """Several sets on a GPU, to outgrow its cache; on a CPU, where a step's input was just written, two."""
        sets, _ = input_sets(self.case.device, self.case.nbytes)
        return [self.case.inputs(seed) for seed in range(sets)]

    @cached_property
    def accuracy(self) -> dict[str, dict[str, Any]]:
        """Of each backend, as `check` has it."""
        return check(self.case, self.backends, self.inputs[0])

    def call(self, candidate: Candidate) -> Callable[[], Any]:
        """What is timed: one computation to its end on the device, each on the next set of inputs. Warm when returned.

        Made and to be run within `candidate.within()`.
        """
        case, peer = self.case, candidate.peer
        if peer is None:
            calls = [case.call(case.ours, inputs) for inputs in self.inputs]
        else:
            calls = [case.call(peer.function, peer.inputs(inputs)) for inputs in self.inputs]
        for call in calls:
            call()
        turn = itertools.cycle(calls)
        if case.device == "cpu":
            return lambda: next(turn)()

        def to_its_end() -> None:
            next(turn)()
            torch.cuda.synchronize()

        to_its_end()
        return to_its_end
