"""varlen_attention, as in inference and as in training."""

from collections.abc import Callable, Iterator

from benchmarks.cases.attention import varlen_attention
from benchmarks.cases.case import BACKWARD, FORWARD, Case
from benchmarks.cases.shapes import Shape


def cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """Without and with dropout, in both directions."""
    for dropout in (False, True):
        for direction in (FORWARD, BACKWARD):
            yield varlen_attention(
                shape.lengths, shape.heads, shape.head_size, dtype, direction, device, shape.batch, dropout
            )


def bench_attention(measure: Callable[[], None]) -> None:
    measure()
