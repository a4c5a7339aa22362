"""embed_layer_norm with tables of BERT's size."""

from collections.abc import Callable, Iterator

from benchmarks.cases.case import BACKWARD, FORWARD, Case
from benchmarks.cases.embedding import embed_layer_norm
from benchmarks.cases.shapes import Shape


def cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """Both directions."""
    for direction in (FORWARD, BACKWARD):
        yield embed_layer_norm(shape.tokens, shape.hidden, dtype, direction, device)


def bench_embedding(measure: Callable[[], None]) -> None:
    measure()
