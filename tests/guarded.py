"""Rows in guarded memory: what a kernel writes beside them is found, and what it reads beside them is NaN."""

import torch
from torch import Tensor

_GUARD = 132  # bytes behind each row, and around them all: more than two vectors, and no multiple of one
_FILL = 0xFF  # NaN of float32 and bfloat16


class Guarded:
    """`rows`: (rows, columns) of a dtype, with `stride` elements from row to row."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.stride = columns + _GUARD // dtype.itemsize
        self._bytes = torch.full((2 * _GUARD + rows * self.stride * dtype.itemsize,), _FILL, dtype=torch.uint8)
        self.rows = (
            self._bytes[_GUARD:].view(dtype).as_strided((rows, columns), (self.stride, 1), _GUARD // dtype.itemsize)
        )

    @property
    def address(self) -> int:
        return self.rows.data_ptr()

    def check(self) -> None:
        """Assert that everything but the rows is as it was."""
        rows = self.rows.clone()
        self.rows.view(torch.uint8).fill_(_FILL)
        assert (self._bytes == _FILL).all(), "written beside the rows"
        self.rows.copy_(rows)


def guard(values: Tensor) -> Guarded:
    """A copy of the values, (rows, columns) or one row, in guarded memory."""
    values = torch.atleast_2d(values)
    copy = Guarded(*values.shape, values.dtype)
    copy.rows.copy_(values)
    return copy
