"""The README's table of compatibility: which path every family and head ran under every seam, as the tests saw it.

Tests `note` each cell that they run. A cell has to be what the committed tests/compatibility.json says, which the
README's table is made of. After a change that is meant:

    python tests/compatibility.py     # run the tests that note cells, and write the file and the table anew
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers
from stock_models import FAMILIES, LEGACY, Family

HERE = Path(__file__).parent
FILE, README = HERE / "compatibility.json", HERE.parent / "README.md"
RECORD = "BERTFAST_COMPATIBILITY"  # names a file that cells are appended to, instead of being compared
VERSION = "4.57" if LEGACY else "5"
SYMBOLS = {"packed": "●", "rectangle": "◐", "stock": "○", "refused": "✕"}
_BLOCK = re.compile(r"(<!-- compatibility: .* -->\n).*?(<!-- end of compatibility -->)", re.DOTALL)

Cells = dict[str, dict[str, str]]  # the path by seam and class


@functools.cache
def committed() -> dict[str, Cells]:
    """The cells by version of transformers."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def note(seam: str, name: str, path: str) -> None:
    """A model of the class `name` ran `path` under this seam; fails where the committed table says otherwise."""
    assert path in SYMBOLS, path
    if record := os.environ.get(RECORD):
        with open(record, "a", encoding="utf-8") as file:  # one short write: whole lines, from parallel workers too
            file.write(json.dumps([seam, name, path]) + "\n")
        return
    found = committed()[VERSION].get(seam, {}).get(name)
    assert found == path, (
        f"{name} under {seam!r} ran {path}, and tests/compatibility.json says {found}: if that is right, "
        "python tests/compatibility.py writes it anew"
    )


def table(cells: dict[str, Cells]) -> str:
    """The README's table: a row for each seam, a column for each family, footnotes for heads that differ."""
    notes: list[str] = []
    lines = [["seam", *FAMILIES], ["---"] * (len(FAMILIES) + 1)]
    lines += [[seam, *(_cell(row, family, notes) for family in FAMILIES.values())] for seam, row in _rows(cells)]
    legend = ", ".join(f"{symbol} {path}" for path, symbol in SYMBOLS.items())
    below = [legend, *(f"<sup>{i}</sup> {text}" for i, text in enumerate(notes, 1))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + "  \n".join(below) + "\n"


def _rows(cells: dict[str, Cells]) -> list[tuple[str, dict[str, str]]]:
    """The seams of transformers 5, and those whose paths are others in 4.57 once more for that."""
    rows = []
    for seam, row in sorted(cells["5"].items()):
        rows.append((seam, row))
        older = cells["4.57"].get(seam, {})
        if any(row.get(name, path) != path for name, path in older.items()):
            rows.append((f"{seam} (4.57)", older))
    return rows


def _cell(row: dict[str, str], family: Family, notes: list[str]) -> str:
    paths = {name.removeprefix(family.prefix): row[name] for name in family.classes if name in row}
    if not paths:
        return "–"
    most = max(SYMBOLS, key=lambda path: list(paths.values()).count(path))
    others: dict[str, list[str]] = {}
    for head, path in paths.items():
        if path != most:
            others.setdefault(path, []).append(head)
    if not others:
        return SYMBOLS[most]
    text = "; ".join(f"{', '.join(heads)}: {SYMBOLS[path]}" for path, heads in others.items())
    if text not in notes:
        notes.append(text)
    return f"{SYMBOLS[most]}<sup>{notes.index(text) + 1}</sup>"


def placed(readme: str, cells: dict[str, Cells]) -> str:
    """The README with the table between its markers written anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{table(cells)}{found[2]}", readme)


def record(arguments: list[str]) -> Cells:
    """What the tests note on this version of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cells.jsonl"
        importing = "from compatibility import note"
        noting = [str(path) for path in sorted(HERE.glob("test_*.py")) if importing in path.read_text(encoding="utf-8")]
        command = [sys.executable, "-m", "pytest", "-q", *noting, *arguments]
        if subprocess.run(command, env={**os.environ, RECORD: str(file)}).returncode:
            raise SystemExit("a test fails: nothing is written")
        cells: Cells = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            seam, name, path = json.loads(line)
            if cells.setdefault(seam, {}).setdefault(name, path) != path:
                raise SystemExit(f"{name} under {seam!r} ran {path} and {cells[seam][name]}: give them two names")
    return {seam: dict(sorted(row.items())) for seam, row in sorted(cells.items())}


def main() -> None:
    """Run the tests and write the file, for the installed version; and the README's table."""
    found = committed() | {VERSION: record(sys.argv[1:])}
    FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    README.write_text(placed(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"written for transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
