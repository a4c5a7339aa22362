"""What the GEMMs of inference on the CPU multiply, where that is not what the weights are."""

import warnings

from bertfast import machine

_COMPUTE = {"bf16": "bfloat16", "bfloat16": "bfloat16"}


def operand_of(compute: str | None, pack_weights: bool = True) -> str | None:
    """The operand, as of `PackedWeights`, that the option `compute` of `patch` and of the native models asks for.

    None where it asks for none, and, with a warning, where this processor would be slower with it. ValueError where
    there is no such thing.
    """
    if compute is None:
        return None
    if compute not in _COMPUTE:
        raise ValueError(
            f'compute must be None, for what the weights are, or "bf16", not {compute!r}; for int8 there is '
            "bertfast.quantize, which measures what it does to a model"
        )
    if not pack_weights:
        raise ValueError("compute is of packed weights: leave out pack_weights=False, or convert the model with .to()")
    if not machine.has_bfloat16():
        warnings.warn(
            f"compute={compute!r}: this processor has no instructions for bfloat16 (AVX512_BF16 or AMX), so inference "
            "stays in the weights' precision",
            stacklevel=3,
        )
        return None
    return _COMPUTE[compute]
