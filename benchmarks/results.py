"""The suite's results: JSON lines of one schema, written as they come and read by the report.

A run writes one line "environment" first, then one "measurement" for each workload, model, peer and precision, and one
"harness" at its end: what the harness itself cost. `--calibrate` writes "calibration". All carry the run's id.
"""

import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

SCHEMA = 2
OUT_OF_TIME = "give it more --seconds"  # in the reason of whatever was skipped for want of it
SUITE = Path(__file__).parent / "results" / "suite.jsonl"

Record = dict[str, Any]


class Writer:
    """Appends the records of one run to a file, each on the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, record: str, **fields: Any) -> Record:
        """One line of this kind of record."""
        line = {"schema": SCHEMA, "record": record, "run": self.run, **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return line


def records(path: Path) -> list[Record]:
    """All records of a file, in order. What is of another schema or no record is counted on stderr and passed over."""
    found, older, broken = [], [], []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            broken.append(number)
        elif line.get("schema") != SCHEMA:
            older.append(number)
        else:
            found.append(line)
    for numbers, what in ((older, f"not of schema {SCHEMA}: measure them anew"), (broken, "no JSON objects")):
        if numbers:
            places = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
            print(f"{path}: passed over {len(numbers)} lines ({places}), {what}", file=sys.stderr)
    return found


def read(path: Path) -> tuple[dict[str, Record], list[Record]]:
    """The environments by run, and all measurements."""
    found = records(path)
    environments = {r["run"]: r for r in found if r["record"] == "environment"}
    return environments, [r for r in found if r["record"] == "measurement"]
