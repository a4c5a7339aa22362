"""The few PTX instructions that Triton kernels of this project contain, carried out on arrays of 32-bit registers.

Source: NVIDIA, "Parallel Thread Execution ISA", chapter Instructions.
"""

import re
from collections.abc import Sequence

import numpy as np


def _permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32: each of the selector's lower four nibbles names one of eight bytes, b's above a's, for a byte of the
    result; with its highest bit, that byte's own highest bit eight times."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte >> np.uint32(7), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


_INSTRUCTIONS = {
    "and.b32": np.bitwise_and,
    "prmt.b32": _permute_bytes,
    "mul.wide.u32": lambda a, b: a.astype(np.uint64) * b.astype(np.uint64),
}


def run(code: str, operands: Sequence[np.ndarray]) -> np.ndarray:
    """What is in $0 after the code, with the operands, uint32 arrays of one shape, in $1, $2, ...

    Raises NotImplementedError for an instruction that is not known here.
    """
    registers = {f"${i}": operand for i, operand in enumerate(operands, 1)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(operands[0], int(name, 0))

    for statement in filter(None, (part.strip() for part in re.split("[{};]", code))):
        name, _, arguments = statement.partition(" ")
        if name == ".reg":
            continue
        if name not in _INSTRUCTIONS:
            raise NotImplementedError(f"tests/ptx.py does not know the instruction {name}")
        target, *sources = (argument.strip() for argument in arguments.split(","))
        registers[target] = _INSTRUCTIONS[name](*map(value, sources))
    return registers["$0"]
