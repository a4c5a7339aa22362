"""What machine code must not be like: what is asked of all kernels, and of each one by its name."""

import re
from typing import NamedTuple

from benchmarks.static.architectures import ARCHITECTURES
from benchmarks.static.machine import Machine

TOLERANCE = 0.05  # of the number of instructions: what another register allocation makes of the same source


class Rule(NamedTuple):
    """What is asked of a kernel besides what is asked of all: no spills, and room on the multiprocessor."""

    loads: float = 0.0  # the least share of the bytes that it loads from global memory 16 at a time
    stores: float = 0.0  # and of those that it stores
    matrix: bool = False  # half precision is multiplied by the matrix units
    bulk: bool = False  # the tensor memory accelerator moves its tiles in half precision, where there is one
    occupancy: float = 0.0  # the least share of a multiprocessor's warps


# The first that matches. What is not 16 bytes wide is vectors, ids and statistics; kernels that add up a few sums at
# the end store next to nothing.
RULES: list[tuple[str, Rule]] = [
    (r"_bias_gelu_fwd_kernel", Rule(loads=0.9, stores=1.0, occupancy=0.3)),
    (r"_bias_gelu_bwd_kernel", Rule(loads=0.9, stores=0.75, occupancy=0.3)),
    (r"_add_chunks_kernel", Rule(loads=1.0, occupancy=0.5)),
    (r"_residual_layer_norm_fwd_kernel", Rule(loads=0.8, stores=0.6, occupancy=0.25)),
    (r"_residual_layer_norm_bwd_kernel", Rule(loads=0.75, stores=1.0, occupancy=0.12)),
    (r"_embed_layer_norm_fwd_kernel", Rule(loads=0.55, stores=0.6, occupancy=0.25)),
    (r"_embed_layer_norm_bwd_kernel", Rule(loads=0.6, stores=1.0, occupancy=0.18)),
    (r"_add_runs_kernel", Rule(loads=0.45, stores=0.75, occupancy=0.18)),
    (r"_join_runs_kernel", Rule(loads=0.5, occupancy=0.4)),
    (r"_linear_fwd_kernel", Rule(matrix=True, bulk=True, occupancy=0.12)),
    (r"_varlen_attention_(short|tiled)_\w+_kernel", Rule(matrix=True, occupancy=0.12)),
    (r"gelu\.cu (forward|backward)_kernel<.*, true>", Rule(loads=0.9, stores=0.75)),
    (r"\w+\.cu norm_forward_kernel<\w+, true, .*", Rule(loads=0.65, stores=0.6)),
    (r"\w+\.cu norm_backward_kernel<\w+, true, .*", Rule(loads=0.65, stores=0.35)),
    (r"attention\.cu attention_kernel<.*", Rule(loads=0.9, matrix=True)),
    (r"attention\.cu attention_kernel_wgmma<.*", Rule()),  # of sm_90a alone
    # Elements one by one, where addresses are no multiples of 16 bytes or rows too wide.
    (r"gelu\.cu (forward|backward)_kernel<.*, false>", Rule()),
    (r"\w+\.cu (wide_)?norm_(forward|backward)_kernel<.*", Rule()),
    (r"\w+\.cu (add_chunks|add_runs|join_runs)_kernel<.*", Rule()),
]


def rule(kernel: str) -> Rule:
    """The rule of a kernel. Raises LookupError where nobody has written one."""
    for pattern, found in RULES:
        if re.fullmatch(pattern, kernel):
            return found
    raise LookupError(f"{kernel} has no rule in {__file__}")


def violations(machine: Machine, asked: Rule, architecture: int, half: bool) -> list[str]:
    """Why the kernel does not pass; nothing where it does. half: it computes in half precision."""
    if machine.code is None:
        return [f"does not compile: {machine.error}"]
    code, found = machine.code, []
    if machine.stack or code.local:
        found.append(f"spills: {machine.stack} bytes of stack, {code.local} instructions that use it")
    if machine.serialised:
        found.append("wgmma is serialised")
    if machine.shared > ARCHITECTURES[architecture].shared_block:
        found.append(f"{machine.shared} bytes of shared memory, of {ARCHITECTURES[architecture].shared_block}")
    elif machine.occupancy < asked.occupancy:
        found.append(f"occupancy {machine.occupancy:.2f}, under {asked.occupancy:.2f}: {machine.registers} registers")
    loads = {width: code.loads.get(width, 0) + code.copies.get(width, 0) for width in {*code.loads, *code.copies}}
    found += _narrow("loads", loads, asked.loads) + _narrow("stores", code.stores, asked.stores)
    if asked.matrix and half and not code.matrix:
        found.append("no matrix instructions")
    if asked.bulk and half and architecture >= 90 and not code.bulk:
        found.append("tiles are not moved by the tensor memory accelerator")
    return found


def _narrow(what: str, widths: dict[int, int], least: float) -> list[str]:
    share = wide_share(widths)
    if share >= least:
        return []
    counts = ", ".join(f"{count} of {width} bits" for width, count in sorted(widths.items(), reverse=True)) or "none"
    return [f"narrow {what}: {share:.0%} of the bytes in 128 bits, under {least:.0%} ({counts})"]


def wide_share(widths: dict[int, int]) -> float:
    """The share of the bytes that instructions of 128 bits move."""
    total = sum(width * count for width, count in widths.items())
    return 128 * widths.get(128, 0) / total if total else 0.0


def longer(machine: Machine, before: dict) -> list[str]:
    """Why the kernel has become worse than it was in the baseline: of its loop or, where it has none, of all of it."""
    if machine.code is None:
        return []
    what = "loop" if machine.code.loop and before["loop"] else "instructions"
    now, then = getattr(machine.code, what), before[what]
    if now <= then * (1 + TOLERANCE):
        return []
    return [f"{now} instructions{' in its loop' if what == 'loop' else ''}, {then} in the baseline"]
