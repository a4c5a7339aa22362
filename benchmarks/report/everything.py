"""The table of all that was measured, with all that a line bears."""

from collections.abc import Callable

from benchmarks.report import words
from benchmarks.report.cells import NOTHING, Cell
from benchmarks.report.lines import Line, Lines
from benchmarks.report.tables import Table


def table(lines: Lines) -> Table:
    """A row for each line; columns that would be empty are left out."""
    shown = lines.where(status="measured")
    columns = {title: [column(line) for line in shown] for title, column in EVERYTHING.items()}
    columns = {title: cells for title, cells in columns.items() if any(cell.text for cell in cells)}
    return Table("", "", tuple(columns), list(zip(*columns.values(), strict=True)))


def text(name: str) -> Callable[[Line], Cell]:
    """A column of words: a field as it stands."""
    return lambda line: Cell(line[name], line[name])


def number(name: str, show: Callable[[float], str]) -> Callable[[Line], Cell]:
    """A column of numbers: a field, or part of one as in "error.max", as `show` shows it; empty where there is none."""

    def column(line: Line) -> Cell:
        value = line
        for part in name.split("."):
            value = None if value is None else value.get(part)
        return NOTHING if value is None else Cell(show(value), value)

    return column


def rounds(line: Line) -> Cell:
    """How often it was timed; not at all where memory alone was measured."""
    seconds = line.get("seconds")
    return NOTHING if seconds is None else Cell(str(len(seconds)), len(seconds))


EVERYTHING: dict[str, Callable[[Line], Cell]] = {
    "workload": lambda line: Cell(words.workload(line), words.workload(line)),
    "peer": text("peer"),
    "dtype": text("precision"),
    "device": text("device"),
    "median": number("median_s", words.duration),
    "95 % from": number("low_s", words.duration),
    "to": number("high_s", words.duration),
    "p90": number("p90_s", words.duration),
    "p99": number("p99_s", words.duration),
    "rounds": rounds,
    "tokens/s": number("tokens_per_s", words.count),
    "sequences/s": number("sequences_per_s", words.count),
    "speed-up": number("speedup.value", words.times),
    "over float32": number("speedup_over_float32.value", words.times),
    "largest error": number("error.max", "{:.1e}".format),
    "mean error": number("error.mean", "{:.1e}".format),
    "of the roofline": number("roofline_share", words.percent),
    "memory": number("peak_bytes", words.size),
    "device time": number("device_s", words.duration),
    "energy": number("joules", "{:.3g} J".format),
    "preparing": number("prepare_s", words.duration),
    "first call": number("first_call_s", words.duration),
    "other processes": number("noise.others", words.percent),
    "run": text("run"),
}
