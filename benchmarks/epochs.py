"""Fine-tuning, epoch by epoch: stock and patched MiniLM learn where a sentence of real text comes from.

    python -m benchmarks.epochs [--output FILE] [--epochs N]

The texts are sentences of the standard library's documentation, of all lengths, the class which eighth of it a sentence
stands in. Both train on the same batches in the same order from the same weights, dropout on, and take turns by the
epoch: stock on batches padded to their longest, as transformers' own collator pads them, bertfast on packed ones.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bertfast
from benchmarks import models, training
from benchmarks.report.lines import BASELINE, OURS
from benchmarks.results import SUITE, Writer
from benchmarks.workloads import encode, real_sentences
from bertfast import machine
from bertfast.measure import Ratio, Summary
from bertfast.noise import Watch

SENTENCES, HELD_OUT, BATCH, CLASSES = 1536, 512, 32, 8
WORKLOAD = f"classify {SENTENCES - HELD_OUT} sentences"
PRECISIONS = ("float32", "bfloat16")
GOAL = 2.2
_LEARNING_RATE = 1e-4
_LEAST_ROUNDS = 6  # of a comparison, as in the harness

Ids = list[tuple[int, ...]]


class Learner(NamedTuple):
    """call: ids of a batch's sequences and their labels (None: none), to the model's output."""

    model: nn.Module
    call: Callable[[Ids, Tensor | None], object]
    optimizer: torch.optim.Optimizer


def stock() -> Learner:
    """Hugging Face's model, on rectangles."""
    model = models.build("minilm", "topic")

    def call(ids: Ids, labels: Tensor | None) -> object:
        tensors = [torch.tensor(row) for row in ids]
        mask = [torch.ones_like(row) for row in tensors]
        padded, valid = (nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (tensors, mask))
        return model(input_ids=padded, attention_mask=valid, labels=labels)

    return Learner(model, call, _optimizer(model))


def patched() -> Learner:
    """The same model, patched, on packed batches."""
    model = bertfast.patch(models.build("minilm", "topic"))

    def call(ids: Ids, labels: Tensor | None) -> object:
        return model(bertfast.PackedBatch.from_lists(ids, labels=None if labels is None else labels.tolist()))

    return Learner(model, call, _optimizer(model))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=True)


def epoch(learner: Learner, ids: Ids, labels: Tensor, order: Tensor, precision: str) -> float:
    """Train on all of the sequences in this order; the seconds that it took."""
    autocast = training.AUTOCAST.get(precision)
    learner.model.train()
    begin = time.perf_counter()
    for places in order.split(BATCH):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = learner.call([ids[i] for i in places], labels[places]).loss
        loss.backward()
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    return time.perf_counter() - begin


@torch.no_grad()
def accuracy(learner: Learner, ids: Ids, labels: Tensor) -> float:
    """The share of sequences that the model puts into the right class."""
    learner.model.eval()
    places = torch.arange(len(ids)).split(BATCH)
    found = [learner.call([ids[i] for i in part], None).logits.argmax(1) for part in places]
    return (torch.cat(found) == labels).float().mean().item()


def measure(writer: Writer, precision: str, epochs: int) -> None:
    """Prints and writes a line for stock and one for bertfast."""
    ids = list(encode(real_sentences(SENTENCES)))
    labels = torch.arange(SENTENCES) * CLASSES // SENTENCES
    draw = torch.Generator().manual_seed(0)
    held, train = torch.randperm(SENTENCES, generator=draw).tensor_split([HELD_OUT])
    learners = {BASELINE: stock(), OURS: patched()}
    times: dict[str, list[float]] = {name: [] for name in learners}
    rows, classes = [ids[i] for i in train], labels[train]
    with Watch() as watch:
        for _ in range(epochs):
            order = torch.randperm(len(rows), generator=draw)
            for name, learner in learners.items():
                times[name].append(epoch(learner, rows, classes, order, precision))
    lengths = [len(row) for row in rows]
    padded = sum(BATCH * max(len(rows[i]) for i in part) for part in order.split(BATCH))
    for name, learner in learners.items():
        summary, ratio = Summary.of(times[name]), Ratio.of(times[BASELINE], times[name])
        right = accuracy(learner, [ids[i] for i in held], labels[held])
        writer.write(
            "measurement",
            benchmark="finetuning",
            workload=WORKLOAD,
            model="minilm",
            head="topic",
            peer=name,
            precision=precision,
            device="cpu",
            status="measured",
            reason="",
            sequences=len(rows),
            tokens=sum(lengths),
            padded=padded,
            epochs=epochs,
            seconds=[float(f"{t:.6g}") for t in times[name]],
            median_s=summary.median,
            low_s=summary.low,
            high_s=summary.high,
            baseline=BASELINE,
            speedup={"value": ratio.value, "low": ratio.low, "high": ratio.high},
            accuracy=right,
            goal=GOAL if name == OURS else None,
            noise=watch.noise.to_dict(),
        )
        print(
            f"{precision:9} {name:9} {summary.median:7.2f} s an epoch {ratio.value:5.2f}x  accuracy {right:.3f}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure in every precision."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epochs", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=SUITE, metavar="FILE")
    parser.add_argument("--epochs", type=int, default=_LEAST_ROUNDS, metavar="N")
    options = parser.parse_args(arguments)
    torch.set_num_threads(machine.cores())
    torch.manual_seed(0)
    writer = Writer(options.output)
    writer.write("environment", **machine.environment())
    for precision in PRECISIONS:
        measure(writer, precision, options.epochs)


if __name__ == "__main__":
    main()
