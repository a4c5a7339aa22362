"""The processes of a training: one alone, or those that torchrun started, which compute one training together.

Each says what it is in the environment, as torchrun sets it: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
They talk over NCCL where there are GPUs, one to each process, and over gloo where there are none.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bertfast.errors import BertfastError

# How long a process waits for the others: longer than the first reads a large corpus, and not for ever.
_PATIENCE = timedelta(minutes=30)


class OtherProcessError(BertfastError):
    """Another process of this training failed, so that this one cannot go on."""


@dataclass(frozen=True)
class Processes:
    """rank: which of the `count` processes this one is, from 0. device: where it computes."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sums over all processes of each process's values, which are overwritten."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Waits at the end of the block for all processes; where it failed in one of them, all of them raise.

        The others raise OtherProcessError, so that none waits for a process that is no more.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        messages = self.gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise OtherProcessError(f"stopped with process {rank}: {message}")


@contextmanager
def join_processes() -> Iterator[Processes]:
    """What the environment says of this process, connected with the others between the beginning and the end.

    Raises ValueError for variables that do not fit one another, and torch's errors where nobody answers.
    """
    rank, local, count = (_variable(name, default) for name, default in _VARIABLES)
    if not 0 <= rank < count or local < 0:
        raise ValueError(f"RANK={rank}, LOCAL_RANK={local} and WORLD_SIZE={count} do not fit: start with torchrun")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if count == 1:
        yield Processes(device=device)
        return
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=_PATIENCE)
    # After an error the group is left to the end of the process: closing it could wait for those that failed.
    yield Processes(rank, count, device)
    dist.destroy_process_group()


_VARIABLES: Sequence[tuple[str, int]] = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"the environment has {name}={text!r}, which is not a number: start with torchrun") from None
