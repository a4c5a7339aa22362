"""residual_layer_norm, as in inference and as in training."""

from collections.abc import Callable, Iterator

from benchmarks.cases.case import BACKWARD, FORWARD, Case
from benchmarks.cases.norm import residual_layer_norm
from benchmarks.cases.shapes import Shape


def cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """Without and with dropout, in both directions."""
    for dropout in (False, True):
        for direction in (FORWARD, BACKWARD):
            yield residual_layer_norm(shape.tokens, shape.hidden, dtype, direction, device, dropout)


def bench_norm(measure: Callable[[], None]) -> None:
    measure()
