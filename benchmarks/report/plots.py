"""The plots, each from the lines that are there: one without any is left out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.report import words
from benchmarks.report.figures import Look, Plot, looks, ordered, plain_ticks, plot, sheet, styled
from benchmarks.report.lines import BASELINE, CURVES, OURS, PRECISIONS, UNPACKED, Line, Lines
from benchmarks.report.style import LIGHT
from benchmarks.workloads import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXIS = {"fontsize": 9, "color": LIGHT["muted"]}
KINDS = ("speedup", "throughput", "latency", "scaling", "roofline")  # what the plots' names begin with


def draw(lines: Lines) -> list[Plot]:
    """Every plot that there are lines for."""
    found = []
    with styled():
        for device in lines.devices(benchmark="inference", status="measured"):
            every = lines.where(benchmark="inference", device=device, status="measured")
            every = [line for line in every if line["peer"] != UNPACKED]
            alone = [line for line in every if line["workload"] not in CURVES]
            styles = looks(ordered(every))
            found += [speedups(device, precision, alone) for precision in PRECISIONS]
            found += [curves(shown, device, every, styles) for shown in SHOWN]
            found.append(roofline(device, alone, styles, lines))
    return [plot for plot in found if plot is not None]


def speedups(device: str, precision: str, lines: list[Line]) -> Plot | None:
    """Bars with their intervals: every peer's speed-up, a panel for each workload."""
    panels: dict[str, dict[str, Line]] = {}
    for line in lines:
        if line["precision"] == precision and line["peer"] != BASELINE == line["baseline"] and line["speedup"]:
            panels.setdefault(words.title(line), {})[line["peer"]] = line
    if not panels:
        return None
    peers = ordered(line for panel in panels.values() for line in panel.values())
    furthest = max(line["speedup"]["high"] for panel in panels.values() for line in panel.values())
    figure, axes = sheet(len(panels), height=0.75 + 0.17 * len(peers), sharex=True, sharey=True)
    for ax, (title, by_peer) in zip(axes, panels.items(), strict=True):
        for place, peer in enumerate(peers):
            if peer in by_peer:
                bar(ax, place, by_peer[peer])
        ax.axvline(1, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (3, 2)))
        ax.set(title=title, xlim=(0, 1.2 * furthest), ylim=(len(peers) - 0.4, -0.6))
        ax.set_yticks(range(len(peers)), peers, fontsize=7.5)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
    title = f"Speed-up over Hugging Face with sdpa, {precision}, {device.upper()}"
    return plot(f"speedup-{device}-{precision}", title, figure)


def bar(ax: "Axes", place: int, line: Line) -> None:
    """One bar, its interval as a line on it, its value behind it."""
    ours, (value, low, high) = line["peer"] == OURS, (line["speedup"][end] for end in ("value", "low", "high"))
    ax.barh(place, value, height=0.72, color=LIGHT["ours" if ours else "other"])
    ax.plot([low, high], [place, place], color=LIGHT["ink"], linewidth=0.9)
    ax.annotate(
        words.times(value),
        (high, place),
        (4, 0),
        textcoords="offset points",
        verticalalignment="center_baseline",
        fontsize=7.5,
        fontweight="bold" if ours else "normal",
        bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.8},
    )


@dataclass(frozen=True)
class Curves:
    """How one of the workloads' series is shown: the name of the plot, the axes, and what of a line is drawn.

    unit: stands behind the numbers at the y axis.
    """

    series: str
    name: str
    title: str
    x: str
    y: str
    value: Callable[[Line], float]
    unit: str = ""


SHOWN = (
    Curves("length", "throughput", "Throughput against length", "tokens in each sequence", "valid tokens a second",
           lambda line: line["tokens_per_s"]),
    Curves("batch", "latency", "Latency against batch", "sequences in the batch", "time of a forward",
           lambda line: line["median_s"], "s"),
    Curves("sequences", "scaling", "Scaling with the number of sequences", "sequences in the batch",
           "sequences a second", lambda line: line["sequences_per_s"]),
)  # fmt: skip


def curves(shown: Curves, device: str, lines: list[Line], styles: Mapping[str, Look]) -> Plot | None:
    """A panel for each model and precision, a curve for each peer that has more than one point."""
    places = {name: x for x, name in SERIES[shown.series].items()}
    mine = [line for line in lines if line["workload"] in places]
    found: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for line in sorted(mine, key=lambda line: PRECISIONS.index(line["precision"])):
        panel = found.setdefault((line["model"], line["precision"]), {})
        panel.setdefault(line["peer"], []).append((places[line["workload"]], shown.value(line)))
    panels = {of: {peer: points for peer, points in panel.items() if len(points) > 1} for of, panel in found.items()}
    panels = {of: panel for of, panel in panels.items() if panel}
    if not panels:
        return None
    figure, axes = sheet(len(panels), height=3.0, sharey=True)
    for ax, ((model, precision), by_peer) in zip(axes, panels.items(), strict=True):
        for peer in reversed(styles):  # ours over the others
            if peer in by_peer:
                ax.plot(*zip(*sorted(by_peer[peer]), strict=True), **styles[peer])
        ax.set(title=f"{words.family(model)}, {precision}", xlabel=shown.x)
        plain_ticks(ax, sorted({x for points in by_peer.values() for x, _ in points}), shown.unit)
    figure.supylabel(shown.y, **AXIS)
    drawn = {peer: style for peer, style in styles.items() if any(peer in panel for panel in panels.values())}
    return plot(f"{shown.name}-{device}", f"{shown.title}, {device.upper()}", figure, drawn)


def roofline(device: str, lines: list[Line], styles: Mapping[str, Look], source: Lines) -> Plot | None:
    """What was reached under what the machine was seen to do: a panel a precision, a column of points a workload."""
    panels = {}
    for precision in PRECISIONS:
        mine = [x for x in lines if x["precision"] == precision and x["flops"] and x["bytes"]]
        seen = [environment.get("ceilings", {}) for environment in source.runs(mine)]
        if seen := [ceilings for ceilings in seen if ceilings.get("copy") and ceilings.get(precision)]:
            panels[precision] = mine, max(c["copy"] for c in seen), max(c[precision] for c in seen)
    if not panels:
        return None
    figure, axes = sheet(len(panels), height=4.8, sharey=True)
    for ax, (precision, (mine, copy, flops)) in zip(axes, panels.items(), strict=True):
        for peer in reversed(styles):
            points = [(intensity(x), x["flops"] / x["median_s"]) for x in mine if x["peer"] == peer]
            if points:
                ax.plot(*zip(*points, strict=True), **styles[peer] | {"linestyle": "none"})
        ax.set(title=precision, xlabel="FLOPs for each byte")
        plain_ticks(ax)
        roof(ax, copy, flops, {words.brief(line): intensity(line) for line in mine})
    figure.supylabel("FLOP/s", **AXIS)
    drawn = {line["peer"] for mine, _, _ in panels.values() for line in mine}
    shown = {peer: style | {"linestyle": "none"} for peer, style in styles.items() if peer in drawn}
    return plot(f"roofline-{device}", f"Roofline, {device.upper()}", figure, shown)


def intensity(line: Line) -> float:
    """The operations that the valid tokens need for each byte that has to be moved."""
    return line["flops"] / line["bytes"]


def roof(ax: "Axes", copy: float, flops: float, workloads: Mapping[str, float]) -> None:
    """The two ceilings, from somewhat left of the workloads to somewhat right, and above all the workloads' names."""
    ridge = flops / copy
    left, right = min(*workloads.values(), ridge) / 2, max(*workloads.values(), ridge) * 2
    ax.plot([left, ridge, right], [left * copy, flops, flops], color=LIGHT["muted"], linewidth=1.6)
    small = {"fontsize": 7.5, "color": LIGHT["muted"], "textcoords": "offset points"}
    ax.annotate(words.rate(flops, "FLOP"), (ridge, flops), (2, 4), **small)
    ax.annotate(words.rate(copy, "B"), (ridge, flops), (-8, -3), horizontalalignment="right", **small)
    ax.set_xlim(left, right)
    names: dict[float, str] = {}
    for name, x in sorted(workloads.items(), key=lambda item: item[1]):
        if x >= max(names, default=0) * (right / left) ** 0.045:  # else it would cover its neighbour's name
            names[x] = name
    top = ax.secondary_xaxis("top")
    top.set_xticks(list(names), list(names.values()), rotation=90, fontsize=7)
    top.minorticks_off()
