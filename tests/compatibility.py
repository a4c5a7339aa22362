"""The README's table of compatibility: which path every family and head ran under every seam, as the tests saw it.

Tests `note` each cell that they run. A cell has to be what the committed tests/compatibility.json says, which the
README's table is made of:

    python tests/compatibility.py          # run the tests, and write the file and the table anew
"""

import functools
import json
import os
from pathlib import Path

FILE = Path(__file__).parent / "compatibility.json"
RECORD = "BERTFAST_COMPATIBILITY"  # names a file that cells are appended to, instead of being compared
PATHS = ("packed", "rectangle", "stock", "refused")


@functools.cache
def committed() -> dict[str, dict[str, str]]:
    """The path by seam and class."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def note(seam: str, name: str, path: str) -> None:
    """A model of the class `name` ran `path` under this seam; fails where the committed table says otherwise."""
    assert path in PATHS, path
    if record := os.environ.get(RECORD):
        with open(record, "a", encoding="utf-8") as file:  # one short write: whole lines, from parallel workers too
            file.write(json.dumps([seam, name, path]) + "\n")
        return
    found = committed().get(seam, {}).get(name)
    assert found == path, (
        f"{name} under {seam!r} ran {path}, and tests/compatibility.json says {found}: if that is right, "
        "python tests/compatibility.py writes it anew"
    )
