"""The tables, before anybody decides how they look: which rows and columns, and what is said around them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.report import words
from benchmarks.report.cells import NOTHING, Cell, comparable, median, missing, over_float32, speedup, why
from benchmarks.report.lines import ALONE, BASELINE, CURVES, OURS, PRECISIONS, UNPACKED, Line, Lines, machine, measured


@dataclass(frozen=True)
class Table:
    """A table, what has to be said above it, and what below it."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What the numbers in the cells refer to, each once."""
        return list(dict.fromkeys(cell.note for row in self.rows for cell in row if cell.note))


@dataclass(frozen=True)
class Row:
    """What was measured on one workload in one precision, by peer: the newest line of each."""

    lines: Lines
    by_peer: dict[str, Line]

    @property
    def any(self) -> Line:
        """A line of the row, a measured one where there is one."""
        return next(filter(measured, self.by_peer.values()), next(iter(self.by_peer.values())))

    @property
    def name(self) -> str:
        """The workload's. Lines that were not measured do not know how full it is; those of other precisions may."""
        same = {field: self.any[field] for field in ("workload", "model", "head")}
        return words.workload(next(iter(self.lines.where(**same, status="measured")), self.any))

    @property
    def ours(self) -> Line:
        """bertfast's line."""
        return self.by_peer[OURS]

    @property
    def stock(self) -> Line | None:
        """Hugging Face's, of the same run as bertfast's."""
        return self.lines.baseline(self.ours)


def tabled(lines: Lines, **fields: str) -> list[Line]:
    """The newest lines with these fields, but for those of the curves, which are left to the plots."""
    return [line for line in lines.where(**fields) if line["workload"] not in CURVES]


def rows(lines: Lines, **fields: str) -> list[Row]:
    """The lines with these fields by workload and precision, the precisions of a workload one below the other."""
    found: dict[tuple, dict[str, dict[str, Line]]] = {}
    for line in tabled(lines, **fields):
        workload = found.setdefault((line["workload"], line["model"], line["head"]), {})
        workload.setdefault(line["precision"], {})[line["peer"]] = line
    return [
        Row(lines, workload[precision])
        for workload in found.values()
        for precision in sorted(workload, key=PRECISIONS.index)
    ]


def main(lines: Lines) -> list[Table]:
    """bertfast against Hugging Face, inference: a table for each device."""
    caption = (
        "One forward {where}: Hugging Face with sdpa against the same model patched, in the same precision (int8 "
        "against float32). Interleaved rounds, ratio of medians with its 95 % interval. Goals are of the speed-up over "
        "Hugging Face in float32, which has a column of its own. Errors are the largest of the output on valid "
        "tokens against the same weights in float64, or in float32 where that takes too long; memory is the peak of a "
        "forward's tensors against Hugging Face's. Why a goal is missed stands in benchmarks/NOTES.md."
    )
    columns = {
        "workload": workload,
        "dtype": precision,
        "Hugging Face": stock_time,
        "bertfast": our_time,
        "speed-up": our_speedup,
        "over float32": our_speedup_over_float32,
        "goal": goal,
        "without packed weights": unpacked_speedup,
        "error: Hugging Face / bertfast": errors,
        "memory": memory,
    }
    return against_stock(lines, "inference", caption, columns)


def training(lines: Lines) -> list[Table]:
    """The same for training steps, with what the other peers reach."""
    caption = (
        "One pre-training step {where}, both of BERT's tasks, dropout and AdamW: Hugging Face with sdpa against the "
        "same model patched, in the same precision. "
        "Interleaved rounds, ratio of medians with its 95 % interval; the other columns are speed-ups over Hugging "
        "Face too, and memory is the peak of a step's tensors against Hugging Face's."
    )
    columns = {
        "workload": workload,
        "dtype": precision,
        "Hugging Face": stock_time,
        "bertfast": our_time,
        "speed-up": our_speedup,
        "goal": goal,
        "memory": memory,
    }
    for peer in others(tabled(lines, benchmark="training")):
        columns[peer] = lambda row, peer=peer: speedup(row.by_peer.get(peer))
    return against_stock(lines, "training", caption, columns)


def finetuning(lines: Lines) -> list[Table]:
    """Epochs of fine-tuning, and what was learned in them."""
    caption = (
        "An epoch of fine-tuning {where}: Hugging Face with sdpa on padded batches against the same model patched on "
        "packed ones, by turns. Medians, their ratio with its 95 % interval, and the share of held-out sentences that "
        "are classified right after the last epoch."
    )
    columns = {
        "task": workload,
        "dtype": precision,
        "Hugging Face": stock_time,
        "bertfast": our_time,
        "speed-up": our_speedup,
        "goal": goal,
        "accuracy: Hugging Face / bertfast": accuracies,
    }
    return against_stock(lines, "finetuning", caption, columns)


def activations(lines: Lines) -> list[Table]:
    """The peak of a training step's tensors beyond weights, gradients and the optimizer's state."""
    caption = (
        "Peak of the tensors of a forward and a backward {where}, beyond weights and gradients, dropout on: Hugging "
        "Face with sdpa against the same model patched."
    )
    columns = {
        "workload": workload,
        "dtype": precision,
        "Hugging Face": lambda row: Cell(words.size(row.stock["peak_bytes"]), row.stock["peak_bytes"]),
        "bertfast": lambda row: Cell(words.size(row.ours["peak_bytes"]), row.ours["peak_bytes"]),
        "of it": lambda row: memory(row)._replace(strong=True),
        "goal": lambda row: Cell(f"≤ {words.percent(row.ours['goal'])}", row.ours["goal"]),
    }
    return against_stock(lines, "memory", caption, columns)


def overhead(lines: Lines) -> list[Table]:
    """What a call of a patched model costs beyond the encoder alone, and patching itself."""
    columns = {
        "workload": workload,
        "the encoder alone": lambda row: median(row.by_peer.get(ALONE)),
        "patched": our_time,
        "more": lambda row: Cell(f"{1e6 * row.ours['overhead_s']:.0f} µs", row.ours["overhead_s"]),
        "of it": lambda row: Cell(f"{100 * row.ours['overhead']['value']:.1f} %", row.ours["overhead"]["value"]),
        "`patch`": lambda row: Cell(words.duration(row.ours["patch_s"]), row.ours["patch_s"]),
    }
    tables = []
    for device in lines.devices(benchmark="overhead"):
        where = setting(lines, tabled(lines, benchmark="overhead", device=device), device)
        caption = (
            f"A patched model's call, and the same encoder without transformers on a batch without padding, {where}, "
            "in float32. What it takes more is the median over interleaved rounds; `patch` is the time to patch."
        )
        cells = [
            tuple(column(row) for column in columns.values())
            for row in rows(lines, benchmark="overhead", device=device)
        ]
        tables.append(Table(f"{device.upper()}, overhead", caption, tuple(columns), cells))
    return tables


def against_stock(lines: Lines, benchmark: str, caption: str, columns: dict[str, Callable[[Row], Cell]]) -> list[Table]:
    """A table for each device, with a row for each line of bertfast's, which may say why there is nothing in it."""
    tables = []
    for device in lines.devices(benchmark=benchmark, peer=OURS):
        cells = []
        for row in rows(lines, benchmark=benchmark, device=device):
            if OURS not in row.by_peer:
                continue
            if measured(row.ours):
                cells.append(tuple(column(row) for column in columns.values()))
            else:
                known = {"workload": workload(row), "dtype": precision(row), "bertfast": missing(row.ours)}
                cells.append(tuple(known.get(title, NOTHING) for title in columns))
        where = setting(lines, tabled(lines, benchmark=benchmark, device=device, peer=OURS), device)
        tables.append(Table(device.upper(), caption.format(where=where), tuple(columns), cells))
    return tables


def peers(lines: Lines) -> list[Table]:
    """Every engine's speed-up: a table for each device and precision, with a row for each workload."""
    tables = []
    for device in lines.devices(benchmark="inference"):
        for word in PRECISIONS:
            mine = tabled(lines, benchmark="inference", device=device, precision=word)
            names = [OURS] * any(line["peer"] == OURS and measured(line) for line in mine) + others(mine)
            if not names:
                continue
            stock = word if any(line["peer"] == BASELINE and measured(line) for line in mine) else "float32"
            caption = f"Speed-up in {word} over Hugging Face with sdpa in {stock}, {setting(lines, mine, device)}."
            absent = {
                line["peer"]: why(line)
                for line in mine
                if not measured(line) and line["peer"] not in (*names, OURS, BASELINE, UNPACKED)
            }
            remarks = tuple(f"{name}: {reason}" for name, reason in absent.items())
            here = rows(lines, benchmark="inference", device=device, precision=word)
            cells = [peer_cells(row, names) for row in here]
            tables.append(Table(f"{device.upper()}, {word}", caption, ("workload", BASELINE, *names), cells, remarks))
    return tables


def others(lines: Iterable[Line]) -> list[str]:
    """The peers that measured something, but for bertfast and what it is compared with in columns of their own."""
    names = dict.fromkeys(line["peer"] for line in lines if measured(line))
    return [name for name in names if name not in (OURS, UNPACKED, BASELINE)]


def peer_cells(row: Row, names: list[str]) -> tuple[Cell, ...]:
    """The workload, the baseline's time and every peer's speed-up."""
    stock = row.by_peer.get(BASELINE)
    if stock is None or not measured(stock):
        stock = row.lines.baseline(row.any) or stock
    cells = [speedup(row.by_peer.get(name)) for name in names]
    best = max((cell.value for cell in cells if cell.value is not None), default=None)
    return (
        workload(row),
        median(stock),
        *(cell._replace(strong=cell.value is not None and cell.value == best) for cell in cells),
    )


def workload(row: Row) -> Cell:
    return Cell(row.name, row.name)


def precision(row: Row) -> Cell:
    return Cell(row.any["precision"], row.any["precision"])


def stock_time(row: Row) -> Cell:
    return median(row.stock)


def our_time(row: Row) -> Cell:
    return median(row.ours)


def our_speedup(row: Row) -> Cell:
    """bertfast's, with its interval."""
    line = row.ours
    if not comparable(line):
        return missing(line)
    low, high = (words.times(line["speedup"][end]).removesuffix("×") for end in ("low", "high"))
    return speedup(line)._replace(detail=f"({low}–{high})", strong=True)


def our_speedup_over_float32(row: Row) -> Cell:
    """The same over Hugging Face in float32, with its interval."""
    return over_float32(row.ours, interval=True)


def goal(row: Row) -> Cell:
    """The least speed-up, and over which precision of Hugging Face's where that is not the line's."""
    least = row.ours["goal"]
    if least is None:
        return Cell("–")
    over = row.ours.get("goal_over", row.ours["precision"])
    return Cell(f"{least:g}×", least, detail="" if over == row.ours["precision"] else f"over {over}")


def unpacked_speedup(row: Row) -> Cell:
    return speedup(row.lines.beside(row.ours, UNPACKED))


def errors(row: Row) -> Cell:
    """The largest errors of Hugging Face and of bertfast."""
    ours, stock = row.ours["error"]["max"], row.stock
    other = f"{stock['error']['max']:.1e}" if stock else "–"
    return Cell(f"{other} / {ours:.1e}", ours)


def accuracies(row: Row) -> Cell:
    """The shares of held-out rows that Hugging Face and bertfast get right."""
    ours, stock = row.ours["accuracy"], row.stock
    other = words.percent(stock["accuracy"]) if stock else "–"
    return Cell(f"{other} / {words.percent(ours)}", ours)


def memory(row: Row) -> Cell:
    """bertfast's peak of memory as a share of Hugging Face's."""
    ours, stock = row.ours["peak_bytes"], row.stock
    if not ours or not stock or not stock["peak_bytes"]:
        return NOTHING
    return Cell(words.percent(ours / stock["peak_bytes"]), ours / stock["peak_bytes"])


def setting(lines: Lines, about: Iterable[Line], device: str) -> str:
    """Where and with what these lines were measured: "on the CPU (AMD EPYC, 2 threads, PyTorch 2.13.0, …)"."""
    environments = lines.runs(about)
    places = dict.fromkeys(
        f"{machine(e, device)}, PyTorch {e['versions']['torch']}, transformers {e['versions']['transformers']}"
        for e in environments
    )
    commits = dict.fromkeys(map(words.commit, environments))
    on = "on the CPU" if device == "cpu" else "on the GPU"
    return f"{on} ({'; '.join(places)}; commit{'s' * (len(commits) > 1)} {', '.join(commits)})"
