"""masked_lm_loss of a batch of which 15 % are masked."""

from collections.abc import Callable, Iterator

from benchmarks.cases.case import BACKWARD, FORWARD, Case
from benchmarks.cases.loss import masked_lm_loss
from benchmarks.cases.shapes import Shape


def cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """Both directions."""
    for direction in (FORWARD, BACKWARD):
        yield masked_lm_loss(shape.tokens, shape.hidden, dtype, direction, device)


def bench_loss(measure: Callable[[], None]) -> None:
    measure()
