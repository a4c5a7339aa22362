"""One HTML page with the tables, the plots, where and how it was all measured. It needs nothing from any network."""

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from benchmarks.report import everything, precisions, tables, words
from benchmarks.report.cells import Cell, comparable
from benchmarks.report.figures import Plot
from benchmarks.report.lines import CURVES, OURS, PRECISIONS, Line, Lines, machine
from benchmarks.report.style import LIGHT, css
from benchmarks.report.tables import Table

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

HOW = (
    "All engines of a workload and model are prepared first: converted, exported, compiled, run once. What that took "
    "stands in the last table as preparing and first call, and is in no other time.",
    "Before anything is timed, each engine's output on valid tokens is compared with that of the same weights in "
    "float64, or in float32 where there is too much work for it. One that is further off than its precision explains "
    "is not timed.",
    "Then every engine runs once a round, another one first in each, until every median's 95 % interval is under 3 % "
    "of it or the time is used up. So whatever else the machine does meets all of them alike. Speed-ups are ratios of "
    "medians over the same rounds; their intervals are a bootstrap's over whole rounds.",
    "Tokens are those of the texts, never padding. Memory is the peak of PyTorch's tensors in a call, so there is none "
    "for engines that are not PyTorch. The share of the roofline is the least time that the valid tokens' work can "
    "take under the bandwidth and the GEMM rates measured in the same run, over the time that was taken.",
)


def render(lines: Lines, plots: Sequence[Plot]) -> str:
    """The page."""
    shown = sections(lines, plots)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        f'<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><title>bertfast: benchmarks</title>',
        f"<style>\n{css()}{(_HERE / 'page.css').read_text(encoding='utf-8')}</style></head>",
        "<body>",
        *header(lines, shown),
        "<main>",
        *(part for name, body in shown.items() for part in section(name, body)),
        "</main>",
        "<footer><p>Written by <code>python -m benchmarks.report</code> from the lines of results and from nothing "
        "else.</p></footer>",
        f"<script>\n{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def sections(lines: Lines, plots: Sequence[Plot]) -> dict[str, list[str]]:
    """The page's parts by their headings, those without anything left out."""

    def drawn(*kinds: str) -> list[str]:
        return [figure(plot) for plot in plots if plot.name.startswith(kinds)]

    def listed(found: Iterable[Table], name: str) -> list[str]:
        return [table(t, f"{name}-{i}") for i, t in enumerate(found)]

    found = {
        "bertfast against Hugging Face": listed(tables.main(lines), "main"),
        "Precisions": listed(precisions.side_by_side(lines), "precisions"),
        "Against the other engines": listed(tables.peers(lines), "peers") + drawn("speedup"),
        "Lengths and batches": drawn("throughput", "latency", "scaling"),
        "Against the machine": drawn("roofline"),
        "Training": listed(tables.training(lines), "training"),
        "Fine-tuning": listed(tables.finetuning(lines), "finetuning"),
        "What training keeps": listed(tables.activations(lines), "memory"),
        "What patching costs": listed(tables.overhead(lines), "overhead"),
        "Everything measured": list(searchable(lines)),
        "How it was measured": [f"<p>{escape(paragraph)}</p>" for paragraph in HOW],
        "Where it was measured": [environment(e) for e in lines.runs(lines.where())],
    }
    return {name: body for name, body in found.items() if body}


def section(name: str, body: Iterable[str]) -> Iterator[str]:
    """A part under its heading."""
    yield f'<section><h2 id="{anchor(name)}">{escape(name)}</h2>'
    yield from body
    yield "</section>"


def anchor(name: str) -> str:
    """A heading's name in addresses."""
    return re.sub(r"\W+", "-", name.lower())


def header(lines: Lines, names: Iterable[str]) -> Iterator[str]:
    """The title, what it all comes to, and where the parts are."""
    links = " ".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in names)
    yield "<header><h1>bertfast: benchmarks</h1>"
    yield '<p class="lead">The BERT you already have, faster: the same weights, the same numbers, no padding.</p>'
    yield from cards(lines)
    yield f"<nav>{links}</nav></header>"


def cards(lines: Lines) -> Iterator[str]:
    """For each device and precision the least and the greatest speed-up."""
    found = []
    for device in lines.devices(peer=OURS):
        for precision in PRECISIONS:
            mine = lines.where(benchmark="inference", device=device, precision=precision, peer=OURS)
            ratios = [x["speedup"]["value"] for x in mine if comparable(x) and x["workload"] not in CURVES]
            if ratios:
                found.append((f"{device.upper()}, {precision}", min(ratios), max(ratios), len(ratios)))
    if not found:
        return
    yield '<dl class="cards">'
    for name, least, most, n in found:
        stock = " in float32" if name.endswith("int8") else ""
        span = words.times(most) if n == 1 else f"{words.times(least).removesuffix('×')}–{words.times(most)}"
        yield (
            f'<div><dt>{escape(name)}</dt><dd class="figure">{span}</dd>'
            f'<dd class="what">as fast as Hugging Face{stock}, {n} workload{"s" * (n > 1)}</dd></div>'
        )
    yield "</dl>"


def table(t: Table, name: str, tall: bool = False) -> str:
    """A table with its caption and its notes; a click on a column's head sorts it."""
    notes, kinds = t.notes, [kind(t, i) for i in range(len(t.columns))]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{attribute}><button type="button">{escape(column)}</button></th>'
        for column, attribute in zip(t.columns, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(cell(c, notes, "td" if i else "th", kinds[i]) for i, c in enumerate(row)) + "</tr>"
        for row in t.rows
    )
    below = "".join(
        f'<{tag} class="{role}">{"".join(f"<li>{escape(line)}</li>" for line in listed)}</{tag}>'
        for tag, role, listed in (("ol", "notes", notes), ("ul", "remarks", t.remarks))
        if listed
    )
    above = f'<h3>{escape(t.title)}</h3><p class="caption">{escape(t.caption)}</p>' if t.title else ""
    return (
        f'{above}<div class="scroll{" tall" * tall}" role="region" tabindex="0" aria-label="{escape(t.title or name)}">'
        f'<table id="{name}"><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>{below}'
    )


def kind(t: Table, column: int) -> str:
    """Columns of words are flush left, those of numbers flush right."""
    values = [row[column].value for row in t.rows if row[column].value is not None]
    return ' class="words"' if values and all(isinstance(value, str) for value in values) else ""


def cell(c: Cell, notes: list[str], tag: str, attribute: str) -> str:
    """One cell with what it is sorted by."""
    short = f"{c.value:.6g}" if isinstance(c.value, float) else str(c.value)
    value = "" if c.value is None else f' data-value="{escape(short)}"'
    text = f"<b>{escape(c.text)}</b>" if c.strong else escape(c.text)
    text += f" <small>{escape(c.detail)}</small>" if c.detail else ""
    text += f"<sup>{notes.index(c.note) + 1}</sup>" if c.note else ""
    scope = ' scope="row"' if tag == "th" else ""
    return f"<{tag}{scope}{attribute}{value}>{text}</{tag}>"


def searchable(lines: Lines) -> Iterator[str]:
    """All measured lines, with a field to look for some of them."""
    if lines.where(status="measured"):
        yield '<label>Show rows with<input type="search" data-table="everything" placeholder="bertfast int8"></label>'
        yield table(everything.table(lines), "everything", tall=True)


def figure(plot: Plot) -> str:
    """A plot in the page's own colours, light or dark. Its ids are its own, which those of matplotlib are not."""
    svg = plot.svg()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', rf'\1 role="img" aria-label="{escape(plot.title)}"', svg)
    svg = re.sub(r'(?<= id=")|(?<=xlink:href="#)|(?<=url\(#)', f"{plot.name}-", svg)
    svg = svg.replace("font-family: 'DejaVu Sans', sans-serif; ", "")
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return f"<figure>{svg}</figure>"


def environment(record: Line) -> str:
    """What a run says of its machine and its software."""
    versions = record["versions"].items()
    ceilings = record.get("ceilings", {}).items()
    facts = {
        "time": record["time"],
        "commit": record["commit"] or "unknown",
        "processor": f"{machine(record, 'cpu')}, {record['cores']} cores",
        "instructions": ", ".join(record["cpu_features"]),
        "GPU": ", ".join(gpu["name"] for gpu in record["gpus"]),
        "system": record["platform"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions if version),
        "settings": ", ".join(f"{name}={value}" for name, value in record["variables"].items()),
        "measured ceilings": ", ".join(
            words.rate(rate, "B") + " copied" if name == "copy" else f"{words.rate(rate, 'FLOP')} in {name}"
            for name, rate in ceilings
            if rate
        ),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items() if fact)
    return f'<h3>Run {escape(record["run"])}</h3><dl class="facts">{listed}</dl>'
