"""What the launchers know of the GPU they launch on: its architecture and its number of multiprocessors.

Tensors that are on no GPU run in Triton's interpreter (on the CPU) or are compiled ahead of time (meta tensors); for
them the GPU is a pretended one, an H200 unless `pretend` says otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_pretended = (90, 132)


@cache
def _read(index: int | None) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _known(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return _pretended
    return _read(torch.cuda.current_device() if device.index is None else device.index)


def architecture(device: torch.device) -> int:
    """The compute capability times ten: 80 for an A100, 90 for an H100."""
    return _known(device)[0]


def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors the GPU has: 108 for an A100, 132 for an H100."""
    return _known(device)[1]


@contextmanager
def pretend(architecture: int, multiprocessors: int) -> Iterator[None]:
    """Inside the block, tensors that are on no GPU are taken for such a one's."""
    global _pretended
    before = _pretended
    _pretended = architecture, multiprocessors
    try:
        yield
    finally:
        _pretended = before
