"""The log of a training, broken off and gone on with, and the picture of its curves."""

import json
import sys
import time

import pytest

from bertfast.errors import BertfastError
from bertfast.train.progress import Log, draw_curves, read_log

pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")


def write(directory, steps, done=0, offset=0.0):
    with Log(directory, done) as log:
        for step in steps:
            log.write(step, {"loss": step + offset})
        log.sync()


def points(directory):
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "logs"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_a_log_that_goes_on_forgets_what_was_undone(tmp_path):
    write(tmp_path, range(1, 6))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    time.sleep(1 - time.time() % 1)  # TensorBoard orders the files of one process by seconds
    write(tmp_path, range(4, 8), done=3, offset=0.5)
    wanted = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5)]
    assert [(record["step"], record["loss"]) for record in read_log(tmp_path)] == wanted
    assert points(tmp_path) == wanted
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_no_log_has_no_records(tmp_path):
    assert read_log(tmp_path) == []


@pytest.mark.parametrize("steps", [3, 500])
def test_curves(tmp_path, steps):
    from matplotlib.image import imread

    records = [{"step": i, "loss": 1 / i, "accuracy": 1 - 1 / i} for i in range(1, steps + 1)]
    records[0].pop("accuracy")
    panels = {"loss": {"loss": "masked words"}, "accuracy": {"accuracy": "masked words"}}
    draw_curves(records, panels, tmp_path / "curve.png")
    picture = imread(tmp_path / "curve.png")
    assert picture.shape[0] == 900 and picture[..., :3].std() > 0.05


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(BertfastError, match=r"takes tensorboard, .*pip install 'bertfast\[train\]'"):
        Log(tmp_path)
