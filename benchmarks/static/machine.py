"""A kernel's machine code and what it needs of a multiprocessor; and the folder where both are kept between runs."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.static import sass
from benchmarks.static.architectures import occupancy

CACHE = Path(__file__).parents[2] / "build" / "static"


@dataclasses.dataclass
class Machine:
    """`code` is None, and `error` says why, where the compiler made none."""

    error: str = ""
    registers: int = 0
    stack: int = 0  # bytes of local memory for each thread
    shared: int = 0  # bytes
    warps: int = 0
    occupancy: float = 0.0  # the share of a multiprocessor's warps that fit
    serialised: bool = False  # the compiler waits for each wgmma before the next
    code: sass.Code | None = None

    def as_json(self) -> dict[str, Any]:
        """What the baseline keeps."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        code = named.pop("code")
        return named | (code._asdict() if code else {})


def read(text: str, usage: tuple[int, int], shared: int, warps: int, architecture: int, serialised: bool) -> Machine:
    """Of the disassembly of one kernel. usage: registers, and bytes of stack."""
    share = occupancy(architecture, usage[0], shared, warps)
    return Machine("", *usage, shared, warps, round(share, 4), serialised, sass.read(text))


def resources(text: str) -> dict[str, tuple[int, int, int]]:
    """(registers, bytes of stack, bytes of shared memory) of each function, of the output of cuobjdump -res-usage."""
    found, name = {}, ""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["Function"]:
            name = words[1].rstrip(":")
        elif words and words[0].startswith("REG:"):
            usage = dict(word.split(":") for word in words if ":" in word)
            found[name] = int(usage["REG"]), int(usage["STACK"]), int(usage["SHARED"])
    return found


def key(*parts: str | bytes) -> str:
    """The name of what these parts, and the code that reads machine code, make together."""
    digest = hashlib.sha256()
    for part in (*parts, Path(__file__).read_bytes(), Path(sass.__file__).read_bytes()):
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()


def recall(name: str) -> dict[str, Machine] | None:
    """What was remembered under this name: machine code by kernel."""
    try:
        kept = json.loads((CACHE / f"{name}.json").read_text())
    except FileNotFoundError:
        return None
    return {kernel: _machine(**named) for kernel, named in kept.items()}


def _machine(code: dict[str, Any] | None, **named: Any) -> Machine:
    if code is not None:
        for widths in ("loads", "stores", "copies"):
            code[widths] = {int(width): count for width, count in code[widths].items()}
    return Machine(**named, code=None if code is None else sass.Code(**code))


def remember(name: str, machines: Iterable[tuple[str, Machine]]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = {kernel: vars(m) | {"code": m.code and m.code._asdict()} for kernel, m in machines}
    part = CACHE / f"{name}.{os.getpid()}"
    part.write_text(json.dumps(kept))
    part.rename(CACHE / f"{name}.json")
