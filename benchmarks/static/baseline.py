"""The committed baseline: what the machine code was like, one JSON line for each kernel, case, GPU and compiler.

Of Triton it is that of constraints.txt, which is the one that torch there asks for. Another compiler's code is another:
where it has no lines here, nothing is compared.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.static import gates
from benchmarks.static.machine import Machine

PATH = Path(__file__).parent / "baseline.jsonl"


class Key(NamedTuple):
    compiler: str  # "triton 3.7.1"
    kernel: str
    case: str
    architecture: int


class Row(NamedTuple):
    """A kernel's machine code in one case."""

    key: Key
    machine: Machine
    half: bool  # computes in half precision

    def violations(self) -> list[str]:
        return gates.violations(self.machine, gates.rule(self.key.kernel), self.key.architecture, self.half)


def read(path: Path = PATH) -> dict[Key, dict[str, Any]]:
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {Key(*(line.pop(name) for name in Key._fields)): line for line in lines}


def write(rows: Collection[Row], path: Path = PATH) -> None:
    """Put these rows in the place of all that are of the same GPUs, and of the same compilers or earlier of theirs."""
    made = {(_name(row.key.compiler), row.key.architecture) for row in rows}
    kept = {key: line for key, line in read(path).items() if (_name(key.compiler), key.architecture) not in made}
    lines = kept | {row.key: row.machine.as_json() for row in rows}
    path.write_text("".join(json.dumps(key._asdict() | lines[key]) + "\n" for key in sorted(lines)))


def _name(compiler: str) -> str:
    return compiler.split()[0]


def compilers(before: Collection[Key]) -> set[str]:
    return {key.compiler for key in before}


def regressions(rows: Collection[Row], before: dict[Key, dict[str, Any]]) -> dict[Key, list[str]]:
    """What has become worse, or is not in the baseline, or is in it and no longer made; of compilers that it knows."""
    found = {}
    for row in rows:
        if row.key.compiler in compilers(before):
            line = before.get(row.key)
            found[row.key] = ["not in the baseline"] if line is None else gates.longer(row.machine, line)
    made = {(key.compiler, key.architecture) for key in found}
    for key in before.keys() - found.keys():
        if (key.compiler, key.architecture) in made:
            found[key] = ["in the baseline, but no longer made"]
    return {key: reasons for key, reasons in found.items() if reasons}
