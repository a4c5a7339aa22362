"""Pictures of a fine-tuned model's errors."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from bertfast.train.extra import need

_MOST_LABELS_WITH_NUMBERS = 30
_LARGEST_SIDE = 40.0  # inches
_MOST_NAMES = 80  # that fit along such a side


def draw_confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str], path: Path) -> None:
    """A confusion matrix as a PNG: rows are the true labels, columns the predicted ones, shades the shares of a row."""
    need("matplotlib", "drawing a confusion matrix")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = min(max(3.0, 0.5 * len(labels) + 1.5), _LARGEST_SIDE)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)  # pictures only: no window, whatever matplotlib is set to
    axes = figure.add_subplot()
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(labels))
    named = places[:: -(-len(labels) // _MOST_NAMES)]
    names = [labels[i] for i in named]
    axes.set_xticks(named, names, rotation=90, parse_math=False)
    axes.set_yticks(named, names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= _MOST_LABELS_WITH_NUMBERS:
        for i in places:
            for j in places:
                color = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, matrix[i][j], ha="center", va="center", color=color, fontsize="small")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font does not have, one by one
        figure.savefig(path, format="png")
