"""The packed copy of a GEMM's weights that inference on the CPU keeps between calls, and the GEMM on it.

Weights are packed for the kernels of csrc/cpu (`Packed`), in float32, bfloat16 or int8. In bfloat16, on processors with
AMX, they are oneDNN's (`OneDnnPacked`), which has kernels for its tiles.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertfast import machine, native
from bertfast.ops import cpu, gemm, registry

# What a GEMM multiplies, as csrc/cpu/kernels.h numbers it.
OPERANDS = {"float32": 0, "bfloat16": 1, "int8": 2}
# An activation's number there, and its two names in oneDNN.
ACTIVATIONS = {"none": (0, "none", ""), "gelu": (1, "gelu", "none"), "gelu_tanh": (2, "gelu", "tanh")}
_LINE = 64


class Packed(NamedTuple):
    """Weights in the order of csrc/cpu/weights.h. scale, sums: (out_features,), of int8 alone; bias float32."""

    operand: str
    weight: Tensor
    scale: Tensor | None
    sums: Tensor | None
    bias: Tensor | None
    out_features: int
    in_features: int

    @classmethod
    def of(cls, operand: str, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> "Packed":
        """Of dense weights, (out_features, in_features) each, that become one GEMM."""
        code, depth = OPERANDS[operand], weights[0].shape[1]
        columns = sum(w.shape[0] for w in weights)
        # Zeros: columns are filled up to whole panels, rows to whole words.
        packed = torch.zeros(native.cpu.packed_bytes(code, columns, depth), dtype=torch.uint8)
        scale = sums = None
        if operand == "int8":
            scale, sums = torch.empty(columns), torch.empty(columns, dtype=torch.int32)
        first = 0
        for w in weights:
            cpu.launch("pack_weights", w.dtype, code, w, first, w.shape[0], depth, packed, scale, sums)
            first += w.shape[0]
        bias = torch.cat([b.detach().float() for b in biases]) if biases else None
        return cls(operand, packed, scale, sums, bias, columns, depth)

    def linear(self, x: Tensor, activation: str) -> Tensor:
        """activation(x W^T + b) in x's dtype; x: (tokens, in_features)."""
        x, rows, code = x.contiguous(), x.shape[0], OPERANDS[self.operand]
        out = x.new_empty(rows, self.out_features)
        stride = self.in_features * x.element_size()
        operand, scale, zero = x, None, None
        # Rows a multiple of 4 KB apart would all fall into the same few sets of the first-level cache.
        if cpu.DTYPES[x.dtype] != code or stride % 4 or (stride % 4096 == 0 and rows > 8):
            wide = self.in_features * 4 >> code
            stride = (-(-wide // _LINE) | 1) * _LINE
            operand = torch.empty(rows * stride, dtype=torch.uint8)
            if self.operand == "int8":
                scale, zero = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
            source = x, self.in_features, None, None, 0.0, 0, None, 0  # no norm, and nothing but the operand
            made = code, operand, stride, scale, zero
            cpu.launch("operand_fwd", x.dtype, *source, *made, rows, self.in_features)
        weight = self.weight, self.scale, self.sums, self.bias
        residual = None, 0
        cpu.launch(
            "gemm_fwd",
            x.dtype,
            *(code, operand, stride, scale, zero),
            *(*weight, ACTIVATIONS[activation][0], *residual, out, self.out_features),
            *(rows, self.out_features, self.in_features),
        )
        return out

    @property
    def addresses(self) -> list[int]:
        """As csrc/cpu/encoder.h wants a GEMM's parameters."""
        return registry.addresses(OPERANDS[self.operand], self.weight, self.scale, self.sums, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes that the copy holds."""
        return sum(t.nbytes for t in (self.weight, self.scale, self.sums, self.bias) if t is not None)


class OneDnnPacked(NamedTuple):
    """Weights in oneDNN's own layout, in bfloat16."""

    weight: Tensor
    bias: Tensor | None

    # The layout hardly depends on the number of rows that oneDNN is told: within 3 % at 16 to 4096.
    _ROWS_HINT = 1024

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> "OneDnnPacked":
        """Of weights that become one GEMM."""
        weight, bias = (torch.cat([t.detach().bfloat16() for t in ts]) if ts else None for ts in (weights, biases))
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, cls._ROWS_HINT), bias)

    def linear(self, x: Tensor, activation: str) -> Tensor:
        """activation(x W^T + b) in x's dtype; x: (tokens, in_features)."""
        _, attribute, algorithm = ACTIVATIONS[activation]
        return gemm.linear_pointwise(x.bfloat16(), self.weight, self.bias, attribute, [], algorithm).to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the copy holds, without oneDNN's own padding."""
        return self.weight.numel() * self.weight.element_size()


class PackedWeights:
    """The place where `linear` keeps the packed copy of its weights between calls.

    The copy is made at the first inference call and made anew when the weights have changed. Every call compares each
    parameter's address, dtype, shape and autograd version, and a hash of 16 words spread over its values: fused
    optimisers and writes through `parameter.data` leave the version as it was. Only such a write that also misses all
    16 words (to a few rows, say) goes unnoticed, and has to be followed by `clear()`. A call that needs gradients
    drops the copy, so that training does not pay for it.

    Args:
        operand: what the GEMM multiplies, "float32", "bfloat16" or "int8" (weights rounded to 127 steps of each row's
            largest, activations to 255 of each token's range); None: what the weights are.

    Copies and pickles of the object are empty.
    """

    def __init__(self, operand: str | None = None) -> None:
        if operand is not None and operand not in OPERANDS:
            raise ValueError(f"operand must be one of {', '.join(OPERANDS)} or None, not {operand!r}")
        self.operand = operand
        self._copy: _Copy | None = None

    def get(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Packed | OneDnnPacked | None:
        """The concatenated weights, packed, for inputs like x, or None where they cannot be.

        Raises as `linear` does where x and the weights do not fit.
        """
        tensors = (*weights, *biases)
        copy = self._copy
        try:
            if copy is not None and copy.is_of(tensors) and copy.fits(x):
                return copy.packed
            check(x, weights, biases)
            state = state_of(tensors)
        except RuntimeError:  # inference tensors have no version to tell a change by
            state = None
        if state is None or not all(t.is_contiguous() for t in tensors):
            self._copy = None
            return None
        operand = self.operand or str(x.dtype).removeprefix("torch.")
        if operand == "bfloat16" and machine.has_amx():
            packed: Packed | OneDnnPacked = OneDnnPacked.of(weights, biases)
        else:
            packed = Packed.of(operand, weights, biases)
        # Taken after the copy: a write that falls between the two is noticed at the next call.
        self._copy = _Copy(packed, x.dtype, x.shape[1], state, sample_of(tensors))
        return packed

    def clear(self) -> None:
        """Forget the copy; the next inference call makes a new one."""
        self._copy = None

    @property
    def nbytes(self) -> int:
        """Bytes that the copy holds."""
        return 0 if self._copy is None else self._copy.packed.nbytes

    def __deepcopy__(self, memo: dict) -> "PackedWeights":
        return PackedWeights(self.operand)

    def __reduce__(self) -> tuple:
        return PackedWeights, (self.operand,)


class _Copy(NamedTuple):
    """A packed copy, and how the tensors that it was made of were then."""

    packed: Packed | OneDnnPacked
    dtype: torch.dtype
    in_features: int
    state: list[tuple]
    sample: Any

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, with the values that they had."""
        return state_of(tensors) == self.state and self.sample.matches()

    def fits(self, x: Tensor) -> bool:
        return x.dtype is self.dtype and x.dim() == 2 and x.shape[1] == self.in_features


def state_of(tensors: Sequence[Tensor]) -> list[tuple]:
    """What changes when the tensors do, apart from their values. RuntimeError for inference tensors."""
    return [(t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for t in tensors]


def sample_of(tensors: Sequence[Tensor]) -> Any:
    """A hash of a few words of each, with `matches()` to compare with what they are later, at the same addresses."""
    return native.cpu.Fingerprint([(t.data_ptr(), t.nbytes) for t in tensors])


def check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """ValueError / TypeError where the arguments of `linear` do not fit."""
    registry.check_axes("x", x, "tokens", "in_features")
    if not weights or (biases and len(biases) != len(weights)):
        raise ValueError(f"{len(weights)} weights and {len(biases)} biases: give one bias for each weight, or none")
    for i, weight in enumerate(weights):
        registry.check_axes("weight", weight, "out_features", "in_features")
        registry.check_like(x, weight=(weight, (weight.shape[0], x.shape[1])))
        if biases:
            registry.check_like(x, bias=(biases[i], weight.shape[:1]))
