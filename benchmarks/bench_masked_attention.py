"""masked_attention of a padded batch."""

from collections.abc import Callable, Iterator

from benchmarks.cases.case import BACKWARD, FORWARD, Case
from benchmarks.cases.masked_attention import masked_attention
from benchmarks.cases.shapes import Shape


def cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """Both directions."""
    for direction in (FORWARD, BACKWARD):
        yield masked_attention(shape.lengths, shape.heads, shape.head_size, dtype, direction, device, shape.batch)


def bench_masked_attention(measure: Callable[[], None]) -> None:
    measure()
