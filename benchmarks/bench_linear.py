"""linear: query, key and value, and the feed-forward block's two projections.

The forward on a CPU keeps packed weights, as patched models do.
"""

from collections.abc import Callable, Iterator

from benchmarks.cases.case import BACKWARD, FORWARD, Case
from benchmarks.cases.linear import projection, qkv
from benchmarks.cases.shapes import Shape


def cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """Both directions."""
    tokens, hidden, wide = shape.tokens, shape.hidden, shape.intermediate
    for direction in (FORWARD, BACKWARD):
        packed = device == "cpu" and direction == FORWARD
        yield qkv(tokens, hidden, dtype, device, direction, packed=packed)
        yield projection(tokens, wide, hidden, "gelu", dtype, device, direction, packed=packed)
        yield projection(tokens, hidden, wide, "none", dtype, device, direction, packed=packed)


def bench_linear(measure: Callable[[], None]) -> None:
    measure()
