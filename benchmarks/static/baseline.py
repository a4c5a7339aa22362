"""The committed baseline: what the kernels' machine code was like, one JSON line for each kernel, case and GPU."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.static import gates
from benchmarks.static.machine import Machine

PATH = Path(__file__).parent / "baseline.jsonl"


class Key(NamedTuple):
    source: str  # "triton" or "cuda": what compiled it
    kernel: str
    case: str
    architecture: int


class Row(NamedTuple):
    """A kernel's machine code in one case."""

    key: Key
    machine: Machine
    half: bool

    def violations(self) -> list[str]:
        return gates.violations(self.machine, gates.rule(self.key.kernel), self.key.architecture, self.half)


class Baseline(NamedTuple):
    versions: dict[str, str]  # of the compilers, by source
    lines: dict[Key, dict[str, Any]]


def read(path: Path = PATH) -> Baseline:
    if not path.exists():
        return Baseline({}, {})
    first, *others = map(json.loads, path.read_text().splitlines())
    return Baseline(first["versions"], {Key(*(line.pop(name) for name in Key._fields)): line for line in others})


def write(rows: list[Row], versions: dict[str, str], path: Path = PATH) -> None:
    """Put these rows in the place of all of the same compilers and GPUs; the others stay."""
    before = read(path)
    made = {(row.key.source, row.key.architecture) for row in rows}
    lines = {key: line for key, line in before.lines.items() if (key.source, key.architecture) not in made}
    lines |= {row.key: row.machine.as_json() for row in rows}
    written = [{"versions": before.versions | versions}]
    written += [key._asdict() | lines[key] for key in sorted(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in written))


def regressions(rows: list[Row], versions: dict[str, str], before: Baseline) -> dict[Key, list[str]]:
    """What has become worse, or is not in the baseline, or is in it and no longer made.

    Only of what the same compiler made: another one's code is another.
    """
    comparable = {source for source, version in versions.items() if before.versions.get(source, version) == version}
    rows = [row for row in rows if row.key.source in comparable]
    found = {}
    for row in rows:
        line = before.lines.get(row.key)
        found[row.key] = ["not in the baseline"] if line is None else gates.longer(row.machine, line)
    made = {(row.key.source, row.key.architecture) for row in rows}
    for key in before.lines.keys() - found.keys():
        if (key.source, key.architecture) in made:
            found[key] = ["in the baseline, but no longer made"]
    return {key: reasons for key, reasons in found.items() if reasons}
