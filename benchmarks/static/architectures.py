"""The GPUs that kernels are compiled for, and how much of a kernel fits onto one of their multiprocessors.

Source: CUDA C++ Programming Guide, "Technical specifications per compute capability".
"""

import math
from typing import NamedTuple


class Architecture(NamedTuple):
    """multiprocessors: those of the card that stands for it. Sizes in bytes."""

    multiprocessors: int
    shared: int  # shared memory of a multiprocessor
    shared_block: int  # the most that one block may have
    warps: int
    blocks: int
    registers: int = 65536


ARCHITECTURES = {
    80: Architecture(108, 164 * 1024, 163 * 1024, 64, 32),  # A100
    86: Architecture(84, 100 * 1024, 99 * 1024, 48, 16),  # A40, GeForce 3090
    89: Architecture(142, 100 * 1024, 99 * 1024, 48, 24),  # L40, GeForce 4090
    90: Architecture(132, 228 * 1024, 227 * 1024, 64, 32),  # H100, H200
    100: Architecture(148, 228 * 1024, 227 * 1024, 64, 32),  # B200
}


def resident_blocks(architecture: int, registers: int, shared: int, warps: int) -> int:
    """How many blocks a multiprocessor runs at once, of so many warps, registers a thread and bytes a block."""
    card = ARCHITECTURES[architecture]
    if shared > card.shared_block:
        return 0
    of_a_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
    by_registers = card.registers // of_a_warp // 4 * 4 // warps  # a quarter of the warps on each of four schedulers
    by_shared = card.shared // (math.ceil((shared + 1024) / 128) * 128)  # 1 KiB of each block is the system's
    return min(by_registers, by_shared, card.warps // warps, card.blocks)


def occupancy(architecture: int, registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's warps that can be there at once."""
    return resident_blocks(architecture, registers, shared, warps) * warps / ARCHITECTURES[architecture].warps
