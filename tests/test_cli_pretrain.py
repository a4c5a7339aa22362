"""`bertfast pretrain`: what comes out of it, going on where it stopped, and one clear line for everything bad."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bertfast.cli import main, pretrain
from bertfast.texts import corpus
from bertfast.train import runs
from bertfast.train.progress import read_log

transformers = pytest.importorskip("transformers")
for package in ("tokenizers", "tensorboard", "matplotlib"):
    pytest.importorskip(package)
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ("--layers", "2", "--hidden", "32", "--heads", "2", "--vocabulary-size", "300", "--max-length", "32")
STEPS = ("--steps", "8", "--tokens-per-batch", "600", "--learning-rate", "0.003", "--save-every", "3")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real English, six sentences a document."""
    path = tmp_path_factory.mktemp("texts") / "english.txt"
    sentences = corpus()[:480]
    path.write_text("\n".join(s + "\n" * (i % 6 == 5) for i, s in enumerate(sentences)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing disturbed, with dropout."""
    place = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(texts, place)) == 0
    return place


def arguments(texts: Path, place: Path, *more: str) -> list[str]:
    return ["pretrain", str(texts), "--output", str(place), *SIZES, *STEPS, *more]


def refuse(capsys: Any, *arguments: str, status: int = 2) -> str:
    assert main(list(arguments)) == status
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("bertfast: error: "), error
    return error[-1]


def log(directory: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(directory)]


def test_what_comes_out(capsys, finished, texts):
    model = transformers.AutoModelForPreTraining.from_pretrained(finished)
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.intermediate_size) == (2, 32, 128)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    assert len(tokenizer) == model.config.vocab_size == 300
    assert transformers.AutoModelForMaskedLM.from_pretrained(finished / "checkpoints" / "step-00000006")
    assert [record["step"] for record in log(finished)] == list(range(1, 9))
    assert {"checkpoints", "logs", "curve.png", "run.json"} < {path.name for path in finished.iterdir()}
    assert main(["fill-mask", str(finished), "This is a [MASK]."]) == 0
    # Running it again says the same and changes nothing.
    before = (finished / "model.safetensors").read_bytes()
    assert main(arguments(texts, finished)) == 0
    captured = capsys.readouterr()
    assert "going on after step 8 of 8" in captured.err and f"the model is in {finished}" in captured.out
    assert (finished / "model.safetensors").read_bytes() == before


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """interrupted_at(step): somebody presses Ctrl-C in this step."""
    say = pretrain._say

    def interrupt(step: int) -> None:
        def saying(record: dict) -> str:
            if record["step"] == step:
                signal.raise_signal(signal.SIGINT)
            return say(record)

        monkeypatch.setattr(pretrain, "_say", saying)

    return interrupt


def test_going_on(capsys, tmp_path, texts, finished, interrupted_at):
    interrupted_at(4)
    error = refuse(capsys, *arguments(texts, tmp_path / "run"), status=130)
    assert "interrupted after step 5 of 8, and saved: the same command goes on from there" in error
    other = ("--seed", "7", "--masking", "token")
    error = refuse(capsys, *arguments(texts, tmp_path / "run", *other))
    assert "--masking was whole-word and is token; --seed was 0 and is 7; give the same" in error
    changed = tmp_path / "changed.txt"
    changed.write_text(texts.read_text(encoding="utf-8").replace("the", "teh", 1), encoding="utf-8")
    assert "TEXT was 1 files of" in refuse(capsys, *arguments(changed, tmp_path / "run"))
    moved = tmp_path / "moved.txt"
    shutil.copy(texts, moved)
    for unfinished in (".saving-1", "corpus/.building-2"):
        (tmp_path / "run" / unfinished / "part").mkdir(parents=True)
    assert main(arguments(moved, tmp_path / "run", "--workers", "1", "--keep", "1", "--gradient-checkpointing")) == 0
    assert "going on after step 5 of 8" in capsys.readouterr().err
    assert log(tmp_path / "run") == log(finished)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000008"]
    assert not list((tmp_path / "run").rglob(".*-*"))


def test_a_real_interrupt_with_workers(tmp_path, texts, finished):
    """Terminals and schedulers signal the workers as well."""
    command = [
        sys.executable,
        "-m",
        "bertfast",
        *arguments(texts, tmp_path / "run", "--workers", "1", "--steps", "4000"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    begin = time.monotonic()
    while not log(tmp_path / "run") and time.monotonic() < begin + 60:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    [wait, error] = error.splitlines()
    assert wait == "bertfast: finishing this step, then saving"
    assert error.startswith("bertfast: error: interrupted after step ")
    [last] = [record["step"] for record in log(tmp_path / "run")][-1:]
    assert f"step {last} of 4000, and saved" in error
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08}" / "SHA256SUMS").exists()


def test_two_processes(tmp_path, texts):
    """The curve of one process, but for rounding."""
    same = ("--dropout", "0", "--accumulate", "2", "--precision", "float32", "--steps", "10")
    assert main(arguments(texts, tmp_path / "one", *same)) == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "bertfast",
    ]
    subprocess.run([*torchrun, *arguments(texts, tmp_path / "two", *same)], check=True, timeout=100)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == 10
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-6)


def test_from_a_checkpoint(capsys, tmp_path, texts, finished):
    short = ("--steps", "2", "--tokens-per-batch", "600", "--max-length", "32")
    start = ["pretrain", str(texts), "--from", str(finished), *short, "--output"]
    assert main([*start, str(tmp_path / "more"), "--learning-rate", "1e-9", "--dropout", "0"]) == 0
    old, new = (transformers.AutoModelForPreTraining.from_pretrained(p) for p in (finished, tmp_path / "more"))
    for key, tensor in old.state_dict().items():
        torch.testing.assert_close(new.state_dict()[key], tensor, rtol=0, atol=1e-6)
    assert new.config.hidden_dropout_prob == 0 and old.config.hidden_dropout_prob == 0.1
    assert (tmp_path / "more" / "vocab.txt").read_bytes() == (finished / "vocab.txt").read_bytes()

    assert "leave --size, --heads out" in refuse(capsys, *start, str(tmp_path / "a"), "--size", "tiny", "--heads", "2")
    words = tmp_path / "vocab.txt"
    words.write_text("".join((finished / "vocab.txt").open(encoding="utf-8").readlines()[:200]), encoding="utf-8")
    error = refuse(capsys, *start, str(tmp_path / "b"), "--vocabulary", str(words))
    assert "the vocabulary has 200 words" in error and "vectors for 300: give the one that it was trained" in error
    # What could not begin can be put right in the same place.
    assert main([*start, str(tmp_path / "b"), "--vocabulary", str(finished)]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1, not 0"),
        (["--steps", "few"], "argument --steps: invalid int value: 'few'"),
        (["--epochs", "2"], "not allowed with argument --steps"),
        (["--heads", "3"], "hidden_size 32 must be a multiple of num_attention_heads 3"),
        (["--max-length", "600"], "--max-length 600 is more than the model's 512 positions"),
        (["--warmup", "9"], "--warmup 9 is longer than the whole training of 8 steps"),
        (["--learning-rate", "nan"], "argument --learning-rate: must be greater than 0, not nan"),
        (["--dropout", "1"], "argument --dropout: must be in [0, 1), not 1"),
        (["--tokens-per-batch", "20"], "20 tokens a batch are less than a sequence of 32"),
        (["--vocabulary", "vocab.txt"], "--vocabulary is there already, and --vocabulary-size asks for a new one"),
        (["--vocabulary-size", "20"], "a vocabulary of 20 does not hold the texts' characters"),
        (["--sharded"], "start them with torchrun"),
        (["--learning-rate", "1e30", "--warmup", "0"], "is not finite: there is no checkpoint yet; start anew"),
    ],
)
def test_mistakes(capsys, tmp_path, texts, more, words):
    assert words in refuse(capsys, *arguments(texts, tmp_path / "run", *more))


def test_texts_and_places_that_will_not_do(capsys, tmp_path, texts, monkeypatch):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "no words" in refuse(capsys, *arguments(empty, tmp_path / "run"))
    assert "there is no file or directory" in refuse(capsys, *arguments(tmp_path / "none.txt", tmp_path / "run"))
    assert f"{tmp_path} is not empty and holds no training" in refuse(capsys, *arguments(texts, tmp_path))
    with runs.held_directory(tmp_path / "held"):
        assert "another process is training in" in refuse(capsys, *arguments(texts, tmp_path / "held"))
    assert "cannot be written: File exists" in refuse(capsys, *arguments(texts, empty))
    assert "cannot be written" in refuse(capsys, *arguments(texts, Path("/proc/nowhere")))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    assert "run.json is damaged" in refuse(capsys, *arguments(texts, tmp_path / "damaged"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
    assert "has 0.0 GB left" in refuse(capsys, *arguments(texts, tmp_path / "full"))


def test_strange_environments(capsys, tmp_path, texts, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    assert "RANK=2, LOCAL_RANK=0 and WORLD_SIZE=1 do not fit" in refuse(capsys, *arguments(texts, tmp_path / "run"))
    monkeypatch.setenv("RANK", "first")
    assert "RANK='first', which is not a number" in refuse(capsys, *arguments(texts, tmp_path / "run"))


def test_a_full_disk(capsys, tmp_path, texts, monkeypatch):
    real = torch.save

    def save(state, path):
        real(state, path)
        if state["step"] == 6:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    error = refuse(capsys, *arguments(texts, tmp_path / "run"))
    assert "the checkpoint of step 6" in error and "the disk is full; the one of step 3 stands" in error


def test_settings_are_on_record(finished):
    settings = json.loads((finished / "run.json").read_text())
    assert settings["--learning-rate"] == 0.003 and settings["--from"] is None and settings["processes"] == 1
    assert not {"--output", "--texts", "--save-every", "--keep", "--workers"} & settings.keys()
