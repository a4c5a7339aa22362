"""What a training leaves to look at: log.jsonl, TensorBoard's files under logs/, and a picture of the curves."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from bertfast.train.extra import need

LOG, TENSORBOARD, CURVE = "log.jsonl", "logs", "curve.png"
_SMOOTHED = 50  # a running mean is over this part of the steps


class Log:
    """A line of JSON in `directory`/log.jsonl and TensorBoard's points in `directory`/logs for every step.

    directory: where they are written; it must be there.
    done: how many steps a training has behind it that goes on. What the log says of later ones, which a crash undid, is
        dropped.

    A line is in the file when `write` returns, and on the disk when `sync` does. Raises BertfastError where tensorboard
    is not installed.
    """

    def __init__(self, directory: Path, done: int = 0) -> None:
        tensorboard = need("torch.utils.tensorboard", "the log of a training")
        path = directory / LOG
        kept = [record for record in read_log(directory) if record["step"] <= done]
        temporary = path.with_name(f".{LOG}.tmp")
        temporary.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._points = tensorboard.SummaryWriter(str(directory / TENSORBOARD), purge_step=done + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step, counted from 1."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        for name, value in values.items():
            self._points.add_scalar(name, value, step)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._file.fileno())
        self._points.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._points.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl, none where there is no such file. A last line that a crash cut short is left out."""
    path = directory / LOG
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]


def draw_curves(records: Sequence[Mapping[str, Any]], panels: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """A picture with one panel a y-axis, over steps, of the values in the records.

    panels: from the label of a y-axis to the curves in it, from their keys in the records to their names. A record
    without a key has no point in that curve. Raises BertfastError where matplotlib is not installed.
    """
    need("matplotlib", "drawing curves")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)  # pictures only: no window, whatever matplotlib is set to
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for key, name in curves.items():
            points = [(record["step"], record[key]) for record in records if key in record]
            steps, values = [step for step, _ in points], [value for _, value in points]
            width = len(values) // _SMOOTHED
            if width > 1:
                (line,) = axis.plot(steps, values, alpha=0.3)
                means = _running_means(values, width)
                axis.plot(steps[width - 1 :], means, color=line.get_color(), label=f"{name}, mean of {width} steps")
            else:
                axis.plot(steps, values, label=name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=150)


def _running_means(values: Sequence[float], width: int) -> list[float]:
    """The mean of each `width` values in a row."""
    import numpy as np

    return np.convolve(values, np.ones(width) / width, mode="valid").tolist()
