"""What is in a kernel's machine code: counts of the instructions that decide how fast it can be."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)([^;]*)", re.M)
_WIDTH = re.compile(r"\.(128|64|[US]?16|[US]?8)(?:\.|$)")
_MATRIX = ("HMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA")


class Instruction(NamedTuple):
    address: int
    name: str  # "LDG.E.128"
    operands: str


class Code(NamedTuple):
    """Counts of the instructions of one kernel. Widths are in bits: {128: 4, 32: 1}."""

    instructions: int
    loop: int  # the instructions of the hot loop, 0 where there is none
    loads: dict[int, int]  # from global memory to registers
    stores: dict[int, int]
    copies: dict[int, int]  # from global to shared memory, on their own (cp.async)
    bulk: int  # tiles that the tensor memory accelerator loads or stores
    matrix: dict[str, int]  # by matrix units: HMMA, HGMMA of warpgroups, UTCHMMA from tensor memory
    special: int  # exponentials, reciprocals, ... (MUFU)
    shuffles: int
    barriers: int
    local: int  # to and from local memory: spills, and arrays that are indexed at run time


def disassemble(binary: bytes | Path, *options: str) -> str:
    """The output of cuobjdump, of the one that comes with triton, for a file or its contents."""
    if isinstance(binary, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            return disassemble(Path(file.name), *options)
    command = [TOOLS / "cuobjdump", *options, binary]
    environment = {"PATH": str(TOOLS)}  # of nvdisasm
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"cuobjdump cannot read this: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def functions(text: str) -> Iterator[tuple[str, str]]:
    """(mangled name, its instructions) of the output of cuobjdump -sass."""
    parts = re.split(r"^\s*Function : (\w+).*$", text, flags=re.M)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def read(text: str) -> Code:
    """The counts of one function's instructions."""
    listed = [Instruction(int(address, 16), *rest) for address, *rest in _INSTRUCTION.findall(text)]
    listed = [i for i in listed if i.name != "NOP"]
    names = Counter(i.name for i in listed)
    matrix = Counter()
    for name, count in names.items():
        if name.startswith(_MATRIX):
            matrix[name.split(".")[0]] += count

    def count(*prefixes: str) -> int:
        return sum(n for name, n in names.items() if name.startswith(prefixes))

    return Code(
        instructions=len(listed),
        loop=len(_hot_loop(listed)),
        loads=_widths(names, "LDG."),
        stores=_widths(names, "STG."),
        copies=_widths(names, "LDGSTS."),
        bulk=count("UTMALDG", "UTMASTG", "UBLKCP"),
        matrix=dict(matrix),
        special=count("MUFU"),
        shuffles=count("SHFL"),
        barriers=count("BAR"),
        local=count("LDL", "STL"),
    )


def _widths(names: Counter[str], prefix: str) -> dict[int, int]:
    found: Counter[int] = Counter()
    for name, count in names.items():
        if name.startswith(prefix):
            width = _WIDTH.search(name)
            found[int(width[1].lstrip("US")) if width else 32] += count
    return dict(sorted(found.items(), reverse=True))


def _hot_loop(listed: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most matrix instructions; where none has any, the longest loop with all inside it."""
    spans = []
    for i in listed:
        target = re.search(r"0x([0-9a-f]+)", i.operands) if i.name.startswith("BRA") else None
        if target and int(target[1], 16) < i.address:
            spans.append((int(target[1], 16), i.address))
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    products = {s: sum(s[0] <= i.address <= s[1] and i.name.startswith(_MATRIX) for i in listed) for s in innermost}
    if any(products.values()):
        begin, end = max(innermost, key=lambda span: products[span])
    else:
        begin, end = max(spans, key=lambda span: span[1] - span[0], default=(1, 0))
    return [i for i in listed if begin <= i.address <= end]
