"""bias_gelu of the feed-forward block."""

from collections.abc import Callable, Iterator

from benchmarks.cases.case import BACKWARD, FORWARD, Case
from benchmarks.cases.gelu import bias_gelu
from benchmarks.cases.shapes import Shape


def cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """Both directions."""
    for direction in (FORWARD, BACKWARD):
        yield bias_gelu(shape.tokens, shape.intermediate, dtype, direction, device)


def bench_gelu(measure: Callable[[], None]) -> None:
    measure()
