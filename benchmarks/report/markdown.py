"""Tables as the README has them, and the README around them."""

import re
import textwrap
from collections.abc import Callable, Iterable

from benchmarks.report import precisions, tables
from benchmarks.report.cells import Cell
from benchmarks.report.lines import Lines
from benchmarks.report.tables import Table

WIDTH = 120
# What may stand between the README's markers, by the name in them.
BLOCKS: dict[str, Callable[[Lines], list[Table]]] = {
    "main": tables.main,
    "precisions": precisions.side_by_side,
    "peers": tables.peers,
    "training": tables.training,
    "memory": tables.activations,
    "finetuning": tables.finetuning,
    "overhead": tables.overhead,
}
_BEGIN = re.compile(r"<!-- results (?P<name>[^:\n]+): written by python -m benchmarks\.report -->\n")
_BLOCK = re.compile(
    rf"(?P<begin>{_BEGIN.pattern})"
    r"(?P<body>.*?)"
    r"(?P<end><!-- end of results (?P=name) -->)",
    re.DOTALL,
)


def render(shown: Iterable[Table]) -> str:
    """Caption, table and notes of each."""
    return "\n\n".join(map(one, shown)) or "Not measured yet."


def one(table: Table) -> str:
    """One table."""
    notes = table.notes
    lines = [table.columns, ["---"] * len(table.columns), *([cell(c, notes) for c in row] for row in table.rows)]
    below = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    below += [f"- {remark}" for remark in table.remarks]
    caption = textwrap.fill(table.caption, WIDTH, break_long_words=False, break_on_hyphens=False)
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(filter(None, [caption, grid, "\n".join(below)]))


def cell(c: Cell, notes: list[str]) -> str:
    """One cell, with the number of its note."""
    text = c.text.replace("|", "\\|")
    words = [f"**{text}**" if c.strong else text, c.detail]
    return " ".join(filter(None, words)) + (f"<sup>{notes.index(c.note) + 1}</sup>" if c.note else "")


def placed(readme: str, lines: Lines) -> str:
    """The README with each block between its markers written anew. ValueError where a marker means nothing here."""
    if len(_BEGIN.findall(readme)) != len(_BLOCK.findall(readme)):
        raise ValueError("a block of results in the README has no end: <!-- end of results NAME -->")
    return _BLOCK.sub(lambda found: f"{found['begin']}{body(found['name'], lines)}\n{found['end']}", readme)


def body(name: str, lines: Lines) -> str:
    """What stands in the block of that name."""
    if name not in BLOCKS:
        raise ValueError(f"the README has a block of results {name!r}: choose from {', '.join(BLOCKS)}")
    return render(BLOCKS[name](lines))
