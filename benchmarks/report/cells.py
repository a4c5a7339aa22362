"""What stands in one cell of a table, whether a line has it or not."""

from typing import NamedTuple

from benchmarks.report import words
from benchmarks.report.lines import BASELINE, Line, measured, out_of_time


class Cell(NamedTuple):
    """What a reader sees, what the column is sorted by (None: below all others), and what belongs to it."""

    text: str
    value: float | str | None = None
    detail: str = ""  # behind the text, less prominent
    strong: bool = False
    note: str = ""  # below the table, with a number here


NOTHING = Cell("")


def median(line: Line | None) -> Cell:
    """The median of a peer's rounds."""
    if line is None or not measured(line):
        return missing(line)
    noise = line["noise"]
    taken = words.percent((noise["others"] or 0) + (noise.get("steal") or 0))
    note = f"other processes and the hypervisor took {taken} of the processors' time" if noise["noisy"] else ""
    return Cell(words.duration(line["median_s"]), line["median_s"], note=note)


def speedup(line: Line | None) -> Cell:
    """A peer's speed-up over the baseline."""
    if line is None or not comparable(line):
        return missing(line)
    return Cell(words.times(line["speedup"]["value"]), line["speedup"]["value"])


def over_float32(line: Line | None, interval: bool = False) -> Cell:
    """A peer's speed-up over the baseline in float32, of the same rounds."""
    if line is None or not comparable(line):
        return missing(line)
    ratio = float32_ratio(line)
    if ratio is None:
        return Cell("–", note="measured before ratios to Hugging Face in float32 were, or without it in the same run")
    detail = f"({words.times(ratio['low']).removesuffix('×')}–{words.times(ratio['high']).removesuffix('×')})"
    return Cell(words.times(ratio["value"]), ratio["value"], detail=detail if interval else "")


def float32_ratio(line: Line) -> dict[str, float] | None:
    """The ratio itself. Older lines have it where it was the only one there is."""
    if line["precision"] in ("float32", "int8"):
        return line.get("speedup_over_float32") or line["speedup"]
    return line.get("speedup_over_float32")


def comparable(line: Line) -> bool:
    """Whether the line has a speed-up over Hugging Face."""
    return measured(line) and line["baseline"] == BASELINE and line["speedup"] is not None


def missing(line: Line | None) -> Cell:
    """A dash with the reason; nothing at all where nobody tried. That time was short is one reason for all."""
    if line is None:
        return NOTHING
    if out_of_time(line):
        return Cell("–", note="not measured: that run had too little time for everybody")
    return Cell("–", note=f"{line['peer']}: {why(line)}")


def why(line: Line) -> str:
    """Why a line has no numbers, or no speed-up over Hugging Face."""
    if measured(line):
        return f"measured, but not beside {BASELINE}"
    reason = " ".join(line["reason"].split())
    return reason if line["status"] == "skipped" else f"{line['status']}: {reason}"
