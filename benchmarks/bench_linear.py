"""linear: query, key and value, and the feed-forward block's two projections.

The forward on a CPU keeps packed weights, as patched models do, in int8 too.
"""

from collections.abc import Callable, Iterator

from benchmarks.cases.case import BACKWARD, FORWARD, Case
from benchmarks.cases.linear import projection, qkv, quantised
from benchmarks.cases.shapes import Shape


def cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """Both directions."""
    tokens, hidden, wide = shape.tokens, shape.hidden, shape.intermediate
    for direction in (FORWARD, BACKWARD):
        packed = device == "cpu" and direction == FORWARD
        yield qkv(tokens, hidden, dtype, device, direction, packed=packed)
        yield projection(tokens, wide, hidden, "gelu", dtype, device, direction, packed=packed)
        yield projection(tokens, hidden, wide, "none", dtype, device, direction, packed=packed)
    if device == "cpu" and dtype == "float32":  # which goes in and comes out
        yield quantised(tokens, 3 * hidden, hidden, "none")
        yield quantised(tokens, wide, hidden, "gelu")
        yield quantised(tokens, hidden, wide, "none")


def bench_linear(measure: Callable[[], None]) -> None:
    measure()
