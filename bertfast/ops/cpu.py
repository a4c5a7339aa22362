"""What every op needs to call a launcher of the native CPU module: addresses, dtype codes, the thread count."""

from typing import Any

import torch
from torch import Tensor

from bertfast import native, reference
from bertfast.ops import registry

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as csrc/cpu/kernels.h numbers them


def statistics(rows: int, save: bool) -> tuple[Tensor | None, Tensor | None]:
    """Room for the mean and the reciprocal standard deviation of each row, where the backward will want them."""
    return (torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.float32)) if save else (None, None)


def dropout(p: float, seed: Tensor | None, bits: int = 16) -> tuple[int, int]:
    """The threshold and the seed as the launchers take them."""
    return (0, 0) if seed is None else (reference.dropout_threshold(p, bits), seed.item())


def launch(name: str, dtype: torch.dtype, *arguments: Any) -> Any:
    """Call the launcher `name`: tensors become addresses, None becomes 0, torch's number of threads comes last.

    The arguments tuple keeps every tensor alive until the launcher returns.
    """
    return getattr(native.cpu, name)(DTYPES[dtype], *registry.addresses(*arguments), torch.get_num_threads())
