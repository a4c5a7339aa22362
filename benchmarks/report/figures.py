"""What the plots share: a figure's panels, how each peer looks, and files that are the same from the same numbers.

matplotlib is imported where something is drawn, so that the tables do without it.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report.lines import BASELINE, OURS, Line
from benchmarks.report.style import LIGHT, MARKERS, MATPLOTLIB, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Look = dict[str, Any]

WIDTH, COLUMNS = 10.0, 3  # inches of a figure, panels beside one another


@dataclass(frozen=True)
class Plot:
    """A figure, the name of its files, and what it shows."""

    name: str
    title: str
    figure: "Figure"

    def svg(self) -> str:
        """The figure with its text as text."""
        return self._file("svg", "Date", "Creator", "Format", "Type").decode()

    def png(self) -> bytes:
        """The same in dots."""
        return self._file("png", "Software")

    def _file(self, kind: str, *metadata: str) -> bytes:
        """The file without the metadata that would make it another one on another day."""
        file = io.BytesIO()
        with styled():
            self.figure.savefig(file, format=kind, dpi=144, metadata=dict.fromkeys(metadata))
        return file.getvalue()

    def write(self, folder: Path) -> None:
        """Both files. OSError where they cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.svg").write_text(self.svg(), encoding="utf-8")
        (folder / f"{self.name}.png").write_bytes(self.png())


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib with these settings and none of the user's own, for the while."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(MATPLOTLIB)
        yield


def sheet(panels: int, height: float, **options: Any) -> tuple["Figure", list["Axes"]]:
    """A figure of so many panels, each so many inches high; options are those of `Figure.subplots`."""
    from matplotlib.figure import Figure

    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, rows * height + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for ax in axes[panels:]:
        ax.remove()
    for ax in axes[max(0, panels - columns) : panels]:
        ax.tick_params(axis="x", labelbottom=True)  # also where the panel below was removed
    return figure, axes[:panels]


def plot(name: str, title: str, figure: "Figure", looks: Mapping[str, Look] | None = None) -> Plot:
    """The finished figure: with its title, and a legend of the peers where their looks are given."""
    from matplotlib.lines import Line2D

    figure.suptitle(title, x=0.008, horizontalalignment="left", fontsize=12, fontweight="bold")
    if looks:
        handles = [Line2D([], [], label=peer, **look) for peer, look in looks.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=4)
    return Plot(name, title, figure)


def ordered(lines: Iterable[Line]) -> list[str]:
    """The peers of the lines: bertfast, Hugging Face, the others as they come."""
    names = dict.fromkeys(line["peer"] for line in lines)
    return sorted(names, key=lambda name: (name != OURS, name != BASELINE))


def looks(peers: Iterable[str]) -> dict[str, Look]:
    """How each peer's curve or points are drawn: in a colour and with a marker that no other has together."""
    found: dict[str, Look] = {}
    for peer in peers:
        place = len(found.keys() - {OURS, BASELINE})
        found[peer] = {"color": LIGHT[SERIES[place % len(SERIES)]], "marker": MARKERS[place // len(SERIES)]}
    ours = {"color": LIGHT["ours"], "marker": "o", "linewidth": 2.4, "markersize": 6}
    special = {OURS: ours, BASELINE: {"color": LIGHT["ink"], "marker": "s"}}
    return found | {peer: look for peer, look in special.items() if peer in found}


def plain_ticks(ax: "Axes", x: Sequence[float] | None = None, unit: str = "") -> None:
    """Both axes logarithmic, marked in plain numbers rather than in powers of ten.

    x: where the x axis is marked. unit: of the y axis.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    ax.set(xscale="log", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.yaxis.set_major_formatter(EngFormatter(unit))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    if x is not None:
        ax.set_xticks(x, [f"{value:g}" for value in x])
