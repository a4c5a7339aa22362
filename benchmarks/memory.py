"""What training keeps in memory besides weights, gradients and the optimizer's state: stock against patched.

    python -m benchmarks.memory [--output FILE]

The peak of PyTorch's tensors in a forward and a backward, dropout on, over what there is before, where the gradients of
an earlier one already have their place. The allocator's own records are exact, so that once is enough.
"""

import argparse
import gc
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import bertfast
from benchmarks import models, training
from benchmarks.report.lines import BASELINE, OURS
from benchmarks.results import SUITE, Writer
from benchmarks.workloads import Batch, Workload
from bertfast import machine
from bertfast.measure import peak_memory

PRECISIONS = ("float32", "bfloat16")


class Case(NamedTuple):
    """head: "" where the encoder alone is trained, "pretraining" with both of BERT's tasks. goal: the largest ratio."""

    workload: Workload
    head: str
    goal: float
    model: str = "base"


CASES = (
    Case(Workload("8x128", (128,) * 8, training=True), "", 0.60),
    Case(Workload("pretrain 32x128", (128,) * 32, training=True), "pretraining", 0.45),
)


def peak(model: nn.Module, batch: Batch, precision: str) -> int:
    """Bytes by which tensors grow in a forward and a backward."""

    def run() -> None:
        autocast = training.AUTOCAST.get(precision)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = model(**batch)
        loss = out.loss if "labels" in batch else out.last_hidden_state.float().square().mean()
        loss.backward()

    run()
    return peak_memory(run)


def measure(writer: Writer, case: Case) -> None:
    """Prints and writes a line for each of the two in each precision."""
    workload = case.workload
    for precision in PRECISIONS:
        found: dict[str, int] = {}
        for peer in (BASELINE, OURS):
            model = models.random(case.model, case.head).train()
            (batch,) = workload.batches(model.config.vocab_size)
            if case.head:
                batch = training.labelled(batch)
            if peer == OURS:
                bertfast.patch(model, output_logits=not case.head)
            found[peer] = peak(model, batch, precision)
            del model
            gc.collect()
            ratio = found[peer] / found[BASELINE]
            writer.write(
                "measurement",
                benchmark="memory",
                workload=workload.name,
                model=case.model,
                head=case.head,
                peer=peer,
                precision=precision,
                device="cpu",
                status="measured",
                reason="",
                sequences=len(workload.lengths),
                tokens=workload.tokens,
                padded=workload.padded,
                peak_bytes=found[peer],
                ratio=ratio,
                goal=case.goal if peer == OURS else None,
            )
            print(f"{workload.name:16} {precision:9} {peer:9} {found[peer] / 1e6:8.0f} MB {ratio:6.3f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure all of CASES."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=SUITE, metavar="FILE")
    options = parser.parse_args(arguments)
    writer = Writer(options.output)
    writer.write("environment", **machine.environment())
    for case in CASES:
        measure(writer, case)


if __name__ == "__main__":
    main()
