"""The least time that a forward or a training step can take on a machine whose ceilings were measured.

Work is that of the valid tokens. The steps are those of a fused encoder, each reading its inputs and weights once and
writing its output once; a step takes at least its FLOPs over the rate of the machine's best GEMM, and at least its
bytes over the bandwidth of a copy or of a read, whichever is more. The floor is the sum over the steps. Where
activations stay in a processor's cache between two steps, the bandwidth is no hard limit, and small batches may come
out below their floor.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # bytes of a weight and of an activation
MASKED = 0.15  # of the tokens carry a label in training
_ADAMW = 28  # bytes a parameter: weight, gradient and two moments are read, weight and moments written, all float32


class Step(NamedTuple):
    """One kernel: floating-point operations, and the bytes that it cannot but move."""

    name: str
    flops: float
    nbytes: float

    def floor(self, ceilings: Mapping[str, float], precision: str) -> float:
        """Seconds."""
        bandwidth = max(ceilings["copy"], ceilings.get("read", 0.0))
        return max(self.flops / ceilings[precision], self.nbytes / bandwidth)


def _gemm(name: str, rows: float, columns: int, depth: int, size: int) -> Step:
    return Step(name, 2.0 * rows * columns * depth, size * (rows * depth + columns * depth + rows * columns))


def forward(config: Any, lengths: Sequence[int], precision: str, head: str = "") -> list[Step]:
    """The steps of a forward on sequences of these lengths, of a model of this configuration of transformers."""
    tokens, hidden, inner = sum(lengths), config.hidden_size, config.intermediate_size
    size, squares = ELEMENT[precision], sum(n * n for n in lengths)
    stream = size * tokens * hidden  # one activation, once
    norm = Step("residual and norm", 0.0, 3 * stream)
    steps = [Step("embedding", 0.0, 3 * stream)]  # a row of each of two tables read, one written
    for _ in range(config.num_hidden_layers):
        steps += [
            _gemm("query, key, value", tokens, 3 * hidden, hidden, size),
            Step("attention", 4.0 * squares * hidden, 4 * stream),
            _gemm("attention output", tokens, hidden, hidden, size),
            norm,
            _gemm("up", tokens, inner, hidden, size),
            _gemm("down", tokens, hidden, inner, size),
            norm,
        ]
    return steps + list(_head(config, tokens, len(lengths), size, head))


def _head(config: Any, tokens: int, sequences: int, size: int, head: str) -> Iterator[Step]:
    hidden = config.hidden_size
    if head == "sequence":
        yield _gemm("pooler", sequences, hidden, hidden, size)
        yield _gemm("classifier", sequences, config.num_labels, hidden, size)
    elif head == "token":
        yield _gemm("classifier", tokens, config.num_labels, hidden, size)
    elif head == "pretraining":
        labelled = MASKED * tokens
        yield _gemm("transform", labelled, hidden, hidden, size)
        yield _gemm("decoder", labelled, config.vocab_size, hidden, size)


def training(config: Any, lengths: Sequence[int], precision: str, parameters: int) -> list[Step]:
    """The steps of a pre-training step with AdamW; next sentence prediction, two columns a sequence, is left out.

    The backward of a GEMM is two GEMMs; that of attention recomputes the scores, five products for the forward's two;
    that of the others reads and writes as much again. Only labelled positions go through the head.
    """
    steps = []
    for step in forward(config, lengths, precision, "pretraining"):
        steps.append(step)
        if step.name == "attention":
            steps.append(Step("attention, backward", 2.5 * step.flops, 2 * step.nbytes))
        else:
            steps += [step._replace(name=f"{step.name}, backward")] * (2 if step.flops else 1)
    return [*steps, Step("AdamW", 0.0, float(_ADAMW * parameters))]


def floor(steps: Sequence[Step], ceilings: Mapping[str, float], precision: str) -> float | None:
    """Seconds that the steps take at least; None where this precision's rate was not measured."""
    if precision not in ceilings or "copy" not in ceilings:
        return None
    return sum(step.floor(ceilings, precision) for step in steps)
