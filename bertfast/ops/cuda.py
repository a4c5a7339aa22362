"""What every op needs to call a launcher of the native CUDA module: addresses, dtype codes, the stream, workspaces."""

from typing import Any

import torch
from torch import Tensor

from bertfast import native, reference
from bertfast.ops import registry

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def column_sums(x: Tensor, count: int = 1) -> Tensor:
    """Room for so many sums over the rows of x, (rows, cols), that the launchers add up in a fixed order."""
    return torch.empty(count, native.cuda.row_chunks(x.shape[0]), x.shape[1], dtype=torch.float32, device=x.device)


def statistics(x: Tensor, rows: int, save: bool) -> tuple[Tensor | None, Tensor | None]:
    """Room for the mean and the reciprocal standard deviation of each row, where the backward will want them."""
    if not save:
        return None, None
    return tuple(torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))


def dropout(p: float, seed: Tensor | None, bits: int = 16) -> tuple[int, Tensor | None]:
    """The threshold and the seed as the launchers take them: the kernel reads the seed, nobody waits for it."""
    return (0, None) if seed is None else (reference.dropout_threshold(p, bits), seed)


def launch(name: str, x: Tensor, *arguments: Any) -> Any:
    """Call the launcher `name` on x's device, in x's dtype: tensors become addresses, None becomes 0.

    It runs on the current stream of that device, which comes last; so does whatever reuses the memory of the
    arguments, and a temporary may go as soon as this returns. Raises RuntimeError where the kernel cannot be launched.
    """
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        return getattr(native.cuda, name)(_DTYPES[x.dtype], *registry.addresses(*arguments), stream)
