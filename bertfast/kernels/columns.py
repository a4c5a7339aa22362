"""Sums over the rows of a matrix, (rows, columns) -> (columns,), in two stages that always add in the same order.

First, programs sum chunks of rows while they do other work with them, and write one float32 row each into a
workspace; then the chunks are added. How rows are cut into chunks depends on their number alone, so that the bits do
not depend on the GPU.
"""

import torch
import triton
import triton.language as tl


def chunk_length(rows: int, shortest: int, most: int) -> int:
    """The rows of each chunk but the last: `shortest`, or a multiple of it where that would be over `most` chunks."""
    return shortest * max(1, triton.cdiv(rows, shortest * most))


def workspace(x: torch.Tensor, length: int, sums: int) -> torch.Tensor:
    """Room for the chunks of some sums over rows like those of x: (sums, chunks, columns) float32."""
    return torch.empty(sums, triton.cdiv(x.shape[0], length), x.shape[1], dtype=torch.float32, device=x.device)


@triton.jit
def _add_chunks_kernel(
    workspace,  # (sums, chunks, COLUMNS) float32
    first,  # (COLUMNS,), the outputs; None where there are fewer than three
    second,
    third,
    chunks,
    COLUMNS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    which = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    workspace += which.to(tl.int64) * chunks * COLUMNS
    sums = tl.zeros((BLOCK_CHUNKS, BLOCK_COLUMNS), tl.float32)
    for begin in range(0, chunks, BLOCK_CHUNKS):
        chunk = begin + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunk < chunks)[:, None] & (column < COLUMNS)[None, :]
        sums += tl.load(workspace + chunk[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0)
    total = tl.sum(sums, 0).to(first.dtype.element_ty)
    inside = column < COLUMNS
    if which == 0:
        tl.store(first + column, total, mask=inside)
    # What is None is known to the compiler, and what stands below it is not compiled then.
    if second is not None:  # noqa: SIM102
        if which == 1:
            tl.store(second + column, total, mask=inside)
    if third is not None:  # noqa: SIM102
        if which == 2:
            tl.store(third + column, total, mask=inside)


def add_chunks(workspace: torch.Tensor, *outs: torch.Tensor) -> None:
    """Fills outs, (columns,) each, with the sums over the chunks of the workspace, (len(outs), chunks, columns)."""
    _, chunks, columns = workspace.shape
    grid = triton.cdiv(columns, 32), len(outs)
    padded = (*outs, None, None)[:3]
    _add_chunks_kernel[grid](workspace, *padded, chunks, columns, BLOCK_CHUNKS=128, BLOCK_COLUMNS=32, num_warps=4)
