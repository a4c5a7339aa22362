"""The results of a pass: JSON lines that outlive whatever happens to the process that writes them.

Every item of a phase has a key, and two lines: {"status": "started"} before it, and "done" or "failed" after it. An
item with the first alone was under way when its process ended; the pass writes what became of it ("crashed", "hung"),
or leaves it as it is where the time was over, to be taken up again. Lines without a key are about the phase itself.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

FAILED = ("failed", "crashed", "hung")
ENDED = ("done", *FAILED)


class Results:
    """The file, appended to by the pass and by its phases' processes in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **record: Any) -> None:
        """One line, on the disk when this returns."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **record}) + "\n"
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the process before this one ended within a line
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self, phase: str | None = None) -> list[dict[str, Any]]:
        """All whole lines, of one phase or of all."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return [r for r in records if phase is None or r.get("phase") == phase]

    def _last(self, phase: str) -> dict[str, str]:
        """How each item ended, the last time that it did."""
        return {r["key"]: r["status"] for r in self.read(phase) if "key" in r and r["status"] != "started"}

    def ended(self, phase: str) -> set[str]:
        """The keys of the items that need no further run."""
        return {key for key, status in self._last(phase).items() if status in ENDED}

    def forget(self, phase: str, ended: tuple[str, ...] = ENDED) -> None:
        """Have the items run again that ended so."""
        keys = [key for key, status in self._last(phase).items() if status in ended]
        for key in keys:
            self.append(phase=phase, key=key, status="again")
        if keys:
            self.append(phase=phase, status="again")

    def in_flight(self, phase: str) -> str | None:
        """The key of the item that was begun last, where nothing says how it ended."""
        records = [r for r in self.read(phase) if "key" in r]
        return records[-1]["key"] if records and records[-1]["status"] == "started" else None

    def complete(self, phase: str) -> bool:
        """Whether the phase has gone through all of its items."""
        words = [r["status"] for r in self.read(phase) if "key" not in r and r["status"] != "begun"]
        return words[-1:] == ["complete"]
