"""The training loop: its loss against transformers', its gradient however a step is divided, and going on exactly.

The batches are random words: no tokenizer and no text. Processes that are killed are forked from a clean one, in which
everything is imported already.
"""

import math
import os
import random
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

import bertfast
from bertfast.errors import CheckpointError
from bertfast.packing import PackedBatch
from bertfast.train import pretraining
from bertfast.train.distributed import OtherProcessError, Processes, join_processes
from bertfast.train.pretraining import DivergedError, InterruptedTraining, Pretraining, PretrainingSettings
from bertfast.train.progress import read_log

pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Examples(NamedTuple):
    batch: PackedBatch
    next_sentence_labels: Tensor
    labelled: int
    sequences: int


class RandomBatches:
    """Three batches an epoch, of six sequences of random words, divided among the processes."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Examples]:
        for i in range(start, 3):
            yield self.examples(100 * epoch + i)

    def examples(self, seed: int) -> Examples:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 20, (6,), generator=draw).tolist()
        ids = [torch.randint(5, 61, (n,), generator=draw).tolist() for n in lengths]
        chosen = [(torch.rand(n, generator=draw) < 0.3).tolist() for n in lengths]
        labels = [[i if c else -100 for i, c in zip(*pair, strict=True)] for pair in zip(ids, chosen, strict=True)]
        types = [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]
        follows = torch.randint(0, 2, (6,), generator=draw)
        mine = slice(self.rank, None, self.count)
        batch = PackedBatch.from_lists(ids[mine], types[mine], labels[mine], token_labels=True)
        return Examples(batch, follows[mine], sum(map(sum, chosen)), 6)


def settings(**changes: Any) -> PretrainingSettings:
    defaults = {"steps": 8, "learning_rate": 1e-2, "warmup": 2, "save_every": 3, "seed": 5}
    return PretrainingSettings(**{**defaults, **changes})


def make(directory: Path, processes: Processes = Processes(), keep: int = 2, sizes: dict = {}, **changes: Any) -> Any:  # noqa: B006, B008
    directory.mkdir(exist_ok=True)
    torch.manual_seed(3)
    model = bertfast.BertForPreTraining(bertfast.BertConfig(**SIZES, **sizes))
    batches = RandomBatches(processes.rank, processes.count)
    vocabulary = lambda place: (place / "vocab.txt").write_text("words")  # noqa: E731
    return Pretraining(model, batches, vocabulary, settings(**changes), directory, keep, processes)


def train(directory: Path, **options: Any) -> list[dict[str, float]]:
    """The log of a training, from where it stands to its end."""
    training = make(directory, **options)
    training.resume()
    training.run()
    return log(directory)


def log(directory: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(directory)]


def same_weights(one: Path, other: Path) -> bool:
    states = [bertfast.BertForPreTraining.from_pretrained(place).state_dict() for place in (one, other)]
    return all(torch.equal(t, states[1][key]) for key, t in states[0].items())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with dropout that nothing disturbed."""
    place = tmp_path_factory.mktemp("unbroken")
    train(place)
    return place


def test_steps_are_those_of_transformers(tmp_path):
    """Losses, counts and gradients of stock code, with what torch has for the rest of a step."""
    transformers = pytest.importorskip("transformers")
    training = make(tmp_path, sizes=NO_DROPOUT, steps=3, warmup=1, clip=0.5, weight_decay=0.0)
    stock = transformers.BertForPreTraining(transformers.BertConfig(**SIZES, **NO_DROPOUT))
    stock.load_state_dict(training.model.state_dict())
    training.run()

    adam = torch.optim.Adam(stock.parameters(), eps=1e-6)
    for i, (record, rate) in enumerate(zip(log(tmp_path), (1e-2, 1e-2, 5e-3), strict=True)):
        examples = RandomBatches().examples(i)
        packing = examples.batch.packing
        mask = packing.pad(torch.ones(packing.tokens, dtype=torch.int64))
        words, types = packing.pad(examples.batch.input_ids), packing.pad(examples.batch.token_type_ids)
        labels = packing.pad(examples.batch.labels, -100)
        out = stock(words, mask, types, labels=labels, next_sentence_label=examples.next_sentence_labels)
        adam.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.5)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        right = out.prediction_logits.argmax(-1) == labels
        follows = out.seq_relationship_logits.argmax(1) == examples.next_sentence_labels
        assert record["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
        assert record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert record["mlm_accuracy"] == pytest.approx(right[labels != -100].float().mean().item())
        assert record["nsp_accuracy"] == pytest.approx(follows.float().mean().item())
        assert record["tokens"] == packing.tokens and record["learning_rate"] == pytest.approx(rate)


def test_it_learns(tmp_path):
    class Same(RandomBatches):
        def epoch(self, epoch, start=0):
            yield self.examples(0)

    training = make(tmp_path, sizes=NO_DROPOUT, steps=40)
    training._batches = Same()
    training.run()
    records = log(tmp_path)
    assert records[0]["mlm_loss"] > 3.5 and records[-1]["mlm_loss"] < 0.5
    assert records[-1]["mlm_accuracy"] > 0.9 and records[-1]["nsp_accuracy"] == 1.0


def test_what_comes_out(unbroken):
    transformers = pytest.importorskip("transformers")
    assert sorted(path.name for path in (unbroken / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    for place in (unbroken, *(unbroken / "checkpoints").iterdir()):
        loaded, report = transformers.AutoModelForPreTraining.from_pretrained(place, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and loaded.dtype == torch.float32
        assert (place / "vocab.txt").read_text() == "words"
    assert same_weights(unbroken, unbroken / "checkpoints" / "step-00000008")
    assert not same_weights(unbroken, unbroken / "checkpoints" / "step-00000006")
    assert [record["step"] for record in log(unbroken)] == list(range(1, 9))
    assert (unbroken / "curve.png").stat().st_size > 1000 and list((unbroken / "logs").iterdir())


def test_accumulated_parts_make_the_step_of_all_of_them(tmp_path):
    """Parts of different sizes: means of means would give another loss, and another gradient."""
    parts = train(tmp_path / "parts", sizes=NO_DROPOUT, accumulate=3, steps=4)

    class Whole(RandomBatches):
        def epoch(self, epoch, start=0):
            thirds = [self.examples(100 * epoch + i) for i in range(3)]
            ids = [list(row) for e in thirds for row in e.batch.input_ids.split(list(e.batch.packing.lengths))]
            types = [list(row) for e in thirds for row in e.batch.token_type_ids.split(list(e.batch.packing.lengths))]
            labels = [list(row) for e in thirds for row in e.batch.labels.split(list(e.batch.packing.lengths))]
            batch = PackedBatch.from_lists(ids, types, labels, token_labels=True)
            follows = torch.cat([e.next_sentence_labels for e in thirds])
            yield Examples(batch, follows, sum(e.labelled for e in thirds), 18)

    training = make(tmp_path / "whole", sizes=NO_DROPOUT, steps=4)
    training._batches = Whole()
    training.run()
    for part, whole in zip(parts, log(tmp_path / "whole"), strict=True):
        assert part == pytest.approx(whole, rel=2e-5)


def test_recomputed_layers_have_the_same_gradients(tmp_path, monkeypatch):
    """To the bit, dropout and all."""
    calls, real = [], bertfast.model.encoder_layer
    monkeypatch.setattr(bertfast.model, "encoder_layer", lambda *arguments: calls.append(1) or real(*arguments))
    plain = train(tmp_path / "plain", steps=3)
    recomputed = train(tmp_path / "recomputed", recompute=True, steps=3)
    assert plain == recomputed
    assert len(calls) == 3 * 2 * (1 + 2)  # three steps of two layers, once, and once more in the backward


def test_bfloat16_computes_otherwise_and_learns_the_same(tmp_path):
    exact, rounded = (train(tmp_path / p, sizes=NO_DROPOUT, precision=p) for p in ("float32", "bfloat16"))
    for one, other in zip(exact, rounded, strict=True):
        assert one["loss"] != other["loss"] and one["loss"] == pytest.approx(other["loss"], rel=2e-2)
    saved = bertfast.BertForPreTraining.from_pretrained(tmp_path / "bfloat16").state_dict()
    assert all(t.dtype == torch.float32 for t in saved.values())


def test_lamb_learns(tmp_path):
    records = train(tmp_path, sizes=NO_DROPOUT, optimizer="lamb", steps=12)
    assert records[-1]["loss"] < records[0]["loss"]


def interrupt_at(step: int) -> Any:
    return lambda record: record["step"] == step and signal.raise_signal(signal.SIGTERM)


def test_interrupted_and_gone_on_with(tmp_path, unbroken):
    training = make(tmp_path)
    with pytest.raises(InterruptedTraining, match="after step 5 of 8, and saved"):
        training.run(interrupt_at(4))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert train(tmp_path) == log(unbroken)
    assert same_weights(tmp_path, unbroken)


def test_a_finished_training_stays_as_it_is(unbroken):
    before = log(unbroken)
    (unbroken / "config.json").unlink()
    assert train(unbroken) == before and (unbroken / "config.json").exists()


def _run(place: Path, death: str) -> None:
    """What the killed process does."""
    torch.set_num_threads(1)
    if death == "in a checkpoint":
        real = torch.save

        def save(state: Any, path: Path) -> None:
            real(state, path)
            if state["step"] == 6:
                os.truncate(path, 100)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save
    if death == "at any moment":  # whatever the alarm interrupts: nothing handles it
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.01, 0.4))
    training = make(place)
    training.run(lambda record: record["step"] == 5 and death == "in a step" and os.kill(os.getpid(), signal.SIGKILL))


@pytest.fixture(scope="module")
def clean_processes() -> Any:
    context = mp.get_context("forkserver")
    slow = ("bertfast.train.pretraining", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp")
    context.set_forkserver_preload([*slow, "torch.utils.tensorboard", "matplotlib.figure", "pytest"])
    return context


def test_killed_at_any_moment(tmp_path, unbroken, clean_processes):
    process = clean_processes.Process(target=_run, args=(tmp_path, "at any moment"))
    process.start()
    process.join(60)
    assert process.exitcode in (-signal.SIGALRM, 0)
    assert train(tmp_path) == log(unbroken)
    assert same_weights(tmp_path, unbroken)


@pytest.mark.parametrize("death", ["in a step", "in a checkpoint"])
def test_killed_and_gone_on_with(tmp_path, unbroken, clean_processes, death):
    process = clean_processes.Process(target=_run, args=(tmp_path, death))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000003"} | ({"step-00000006.partial"} if death == "in a checkpoint" else set())
    assert len(read_log(tmp_path)) > 3
    assert make(tmp_path).resume() == 3
    assert train(tmp_path) == log(unbroken)
    assert same_weights(tmp_path, unbroken)
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_damaged_checkpoint_is_not_gone_on_with(tmp_path, unbroken):
    with pytest.raises(InterruptedTraining):
        make(tmp_path).run(interrupt_at(5))
    weights = tmp_path / "checkpoints" / "step-00000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    training = make(tmp_path)
    with pytest.warns(UserWarning, match=r"step-00000006 is damaged \(model.safetensors changed since\)"):
        assert training.resume() == 3
    assert train(tmp_path) == log(unbroken)
    assert "step-00000006.damaged" in {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_a_loss_that_is_not_finite_stops(tmp_path):
    training = make(tmp_path, steps=6)

    def spoil(record):
        if record["step"] == 4:
            with torch.no_grad():
                training.model.bert.pooler.dense.weight[0, 0] = math.nan

    with pytest.raises(DivergedError, match=r"the loss and the gradient norm of step 5 .* step 3 stands"):
        training.run(spoil)
    assert make(tmp_path).resume() == 3
    assert [record["step"] for record in log(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    real = torch.save

    def full(state, path):
        if state["step"] == 6:
            real(state, path)
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"step 6 cannot be written .* the disk is full; the one of step 3 stands"
    ):
        make(tmp_path).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    assert make(tmp_path).resume() == 3


UNDISTURBED = {
    "divided": {"sizes": NO_DROPOUT, "steps": 10, "accumulate": 2},
    "sharded": {"sizes": NO_DROPOUT, "steps": 10, "sharded": True, "optimizer": "lamb"},
}


def _two(place: Path, rank: int, port: int) -> None:
    """What one of two processes does: a training without dropout, one that is interrupted, and two that fail."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pretraining.draw_curves = lambda *_: None  # which takes longer than all else here
    found = {}
    with suppress(RuntimeError), join_processes() as processes:
        for name, options in UNDISTURBED.items():
            make(place / name, processes, **options).run()
        for sharded in (False, True):
            broken = place / f"broken {sharded}"
            make(place / f"whole {sharded}", processes, sharded=sharded, recompute=sharded).run()
            try:  # the report, and so the signal, is in one process
                make(broken, processes, sharded=sharded).run(interrupt_at(4))
            except InterruptedTraining as error:
                found["interrupted", sharded] = str(error)
            training = make(broken, processes, sharded=sharded, recompute=sharded)
            found["done", sharded] = training.resume()
            training.run()
        try:
            with processes.together():
                if rank == 0:
                    raise CheckpointError("the disk is full")
        except Exception as error:
            found["together"] = repr(error)
        torch.save(found, place / f"{rank}.pt")
        training = make(place / "crashed", processes)
        if rank == 1:
            training._update = lambda *_: os._exit(9)
        training.run()
    os._exit(3)


def test_two_processes(tmp_path, clean_processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = [clean_processes.Process(target=_two, args=(tmp_path, rank, port)) for rank in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join(60)
    # The second died in the end, and the first did not wait for it.
    assert [process.exitcode for process in two] == [3, 9]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    for name, options in UNDISTURBED.items():
        alone = train(tmp_path / f"{name} alone", **{**options, "sharded": False})
        for one, both in zip(alone, log(tmp_path / name), strict=True):
            assert one == pytest.approx(both, rel=1e-5, abs=1e-6)

    for sharded in (False, True):
        assert [f["interrupted", sharded] for f in found] == ["interrupted after step 5 of 8, and saved"] * 2
        assert [f["done", sharded] for f in found] == [5, 5]
        broken, whole = tmp_path / f"broken {sharded}", tmp_path / f"whole {sharded}"
        assert log(broken) == log(whole) and same_weights(broken, whole)
    assert found[0]["together"] == "CheckpointError('the disk is full')"
    assert found[1]["together"] == repr(OtherProcessError("stopped with process 0: the disk is full"))
