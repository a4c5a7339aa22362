"""The tables of what each precision buys: everybody in float32, bfloat16 and int8, over Hugging Face in float32."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import goals
from benchmarks.report import words
from benchmarks.report.cells import NOTHING, Cell, median, missing, over_float32, why
from benchmarks.report.lines import BASELINE, OURS, Line, Lines, measured
from benchmarks.report.tables import Table, setting


class Contestant(NamedTuple):
    """An engine in a precision, under the name that its column has."""

    name: str
    peer: str
    precision: str

    @property
    def title(self) -> str:
        return f"{self.name} {self.precision}"


STOCK = [Contestant("Hugging Face", BASELINE, precision) for precision in ("float32", "bfloat16")]
BERTFAST = [Contestant("bertfast", OURS, precision) for precision in goals.PRECISIONS]
CONTESTANTS = [
    *BERTFAST,
    *(Contestant("OpenVINO", "openvino", precision) for precision in goals.PRECISIONS),
    Contestant("ONNX Runtime", "onnxruntime", "float32"),
    Contestant("ONNX Runtime", "onnxruntime-int8", "int8"),
    *(Contestant("CTranslate2", "ctranslate2", precision) for precision in ("float32", "int8")),
]
By = dict[tuple[str, str], Line]  # the newest lines of a workload, by peer and precision


def side_by_side(lines: Lines) -> list[Table]:
    """Speed-ups, errors, and bertfast's shares of the roofline, on the workloads that have goals in all precisions."""
    found = [_by(lines, *case) for case in goals.INFERENCE]
    found = [by for by in found if any(_done(by, contestant) for contestant in BERTFAST)]
    if not found:
        return []
    shown = [c for c in CONTESTANTS if any(_done(by, c) for by in found)]
    about = [line for by in found for c in (*STOCK, *shown) if (line := by.get((c.peer, c.precision)))]
    caption = (
        f"How many times as fast as Hugging Face with sdpa in float32, {setting(lines, about, 'cpu')}, from the rounds "
        "of the same run; of each precision the fastest in bold. bertfast keeps float32 weights in all three, and "
        "its goals stand behind what it reached."
    )
    columns = ("workload", "Hugging Face float32", *(c.title for c in shown))
    rows = [(_workload(by), _stock_time(lines, by), *_speedups(by, shown)) for by in found]
    tables = [Table("CPU, all precisions", caption, columns, rows, _absent(found, shown))]
    accuracy = (
        "The largest error of the output on valid tokens against the same weights in float64, or in float32 where that "
        "takes too long, and in int8 the worst cosine of two outputs."
    )
    tables.append(_plain("CPU, errors of all precisions", accuracy, found, [*STOCK, *shown], _error))
    share = (
        "The share of the valid tokens' roofline that bertfast reaches: the least time that its GEMMs and bytes take "
        "at the rates that were measured in the same run, over the time that it took."
    )
    tables.append(_plain("CPU, shares of the roofline", share, found, BERTFAST, _share))
    return tables


def _by(lines: Lines, workload: str, model: str) -> By:
    of = lines.where(benchmark="inference", device="cpu", head="", workload=workload, model=model)
    return {(line["peer"], line["precision"]): line for line in of}


def _done(by: By, contestant: Contestant) -> bool:
    line = by.get((contestant.peer, contestant.precision))
    return line is not None and measured(line)


def _plain(
    title: str, caption: str, found: Sequence[By], shown: Sequence[Contestant], cell: Callable[[Line], Cell]
) -> Table:
    """A row for each workload, with what `cell` says of each contestant's line."""
    rows = []
    for by in found:
        of = [by.get((c.peer, c.precision)) for c in shown]
        rows.append((_workload(by), *(cell(line) if line and measured(line) else missing(line) for line in of)))
    return Table(title, caption, ("workload", *(c.title for c in shown)), rows)


def _workload(by: By) -> Cell:
    name = words.workload(next(filter(measured, by.values())))
    return Cell(name, name)


def _stock_time(lines: Lines, by: By) -> Cell:
    """Of the run that bertfast was measured in."""
    ours = next(by[OURS, c.precision] for c in BERTFAST if _done(by, c))
    return median(lines.beside(ours, BASELINE, "float32") or by.get((BASELINE, "float32")))


def _speedups(by: By, shown: Sequence[Contestant]) -> list[Cell]:
    cells = {c: over_float32(by.get((c.peer, c.precision))) for c in shown}
    best = {
        precision: max((cells[c].value or 0.0 for c in shown if c.precision == precision), default=0.0)
        for precision in goals.PRECISIONS
    }
    found = []
    for c, cell in cells.items():
        line = by.get((c.peer, c.precision))
        detail = f"(goal {line['goal']:g}×)" if line and line.get("goal_over") == "float32" else ""
        strong = cell.value is not None and cell.value == best[c.precision]
        found.append(cell._replace(detail=detail, strong=strong))
    return found


def _error(line: Line) -> Cell:
    cosine = f"(cosine {line['error']['cosine']:.4f})" if line["precision"] == "int8" else ""
    return Cell(f"{line['error']['max']:.1e}", line["error"]["max"], detail=cosine)


def _share(line: Line) -> Cell:
    share, least = line["roofline_share"], line.get("roofline_goal")
    detail = f"(goal {words.percent(least)})" if least else ""
    return NOTHING if share is None else Cell(words.percent(share), share, detail=detail)


def _absent(found: Sequence[By], shown: Sequence[Contestant]) -> tuple[str, ...]:
    """Why contestants have no column."""
    absent = [(c.title, by.get((c.peer, c.precision))) for c in CONTESTANTS if c not in shown for by in found]
    return tuple(dict.fromkeys(f"{title}: {why(line)}" for title, line in absent if line is not None))
