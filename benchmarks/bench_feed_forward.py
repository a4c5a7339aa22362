"""feed_forward of a layer, as training runs it."""

from collections.abc import Callable, Iterator

from benchmarks.cases.case import BACKWARD, FORWARD, Case
from benchmarks.cases.feed_forward import feed_forward
from benchmarks.cases.shapes import Shape


def cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """Both directions."""
    for direction in (FORWARD, BACKWARD):
        yield feed_forward(shape.tokens, shape.hidden, shape.intermediate, dtype, direction, device)


def bench_feed_forward(measure: Callable[[], None]) -> None:
    measure()
