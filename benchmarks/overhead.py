"""What patching costs: a call of a patched model over the same encoder without transformers around it, and `patch`.

    python -m benchmarks.overhead [--output FILE] [--seconds S]

The encoder alone is bertfast's own class with the same weights, on a batch that never was padded: nothing finds out
what is padding, checks what may have changed on the model, or makes a rectangle of the result.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bertfast
from benchmarks import models
from benchmarks.report.lines import ALONE
from benchmarks.results import SUITE, Writer
from benchmarks.workloads import Batch, Workload, find_workload
from bertfast import machine
from bertfast.measure import Ratio, Summary, interleave
from bertfast.noise import Watch

WORKLOADS = (("1x16", "minilm"), ("1x16", "base"), ("1x128", "base"), ("32x128 ragged", "base"))
_PATCHES, _ROUNDS = 21, 20


def calls(stock: nn.Module, batch: Batch) -> dict[str, Callable[[], Any]]:
    """The patched model's call, and the encoder's alone."""
    patched = bertfast.patch(stock)
    config = bertfast.BertConfig.from_dict(stock.config.to_dict())
    native = bertfast.BertModel(config).eval()
    native.load_state_dict(stock.state_dict())
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = {name: [r[:n] for r, n in zip(batch[name].tolist(), lengths, strict=True)] for name in batch}
    packed = bertfast.PackedBatch.from_lists(rows["input_ids"], rows["token_type_ids"])
    return {"bertfast": partial(patched, **batch), ALONE: partial(native, packed)}


def seconds_to_patch(stock: nn.Module, times: int = _PATCHES) -> list[float]:
    """How long `patch` takes on a model that is not patched, again and again."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        bertfast.patch(stock)
        found.append(time.perf_counter() - begin)
        bertfast.unpatch(stock)
    return found


def measure(writer: Writer, workload: Workload, model: str, seconds: float) -> None:
    """One workload on one model; prints and writes a line for the patched call and one for the encoder alone."""
    stock = models.build(model)
    patching = seconds_to_patch(stock)
    (batch,) = workload.batches(stock.config.vocab_size)
    ready = calls(stock, batch)
    # Inference mode begins after the models are made: weights are packed only where writes to them are counted.
    with torch.inference_mode(), Watch() as watch:
        # Both run on PyTorch's own threads, so there is no rest in between; many rounds tell a thousandth of a call.
        found = interleave(ready, seconds=seconds, least=_ROUNDS, warmup=3)
    alone = found[ALONE]
    for peer, times in found.items():
        summary, ratio = Summary.of(times), Ratio.of(times, alone)
        over = statistics.median(a - b for a, b in zip(times, alone, strict=True))
        writer.write(
            "measurement",
            benchmark="overhead",
            workload=workload.name,
            model=model,
            head="",
            peer=peer,
            precision="float32",
            device="cpu",
            status="measured",
            reason="",
            sequences=len(workload.lengths),
            tokens=workload.tokens,
            padded=workload.padded,
            seconds=[float(f"{t:.6g}") for t in times],
            median_s=summary.median,
            low_s=summary.low,
            high_s=summary.high,
            baseline=ALONE,
            overhead_s=over,
            overhead={"value": ratio.value - 1, "low": ratio.low - 1, "high": ratio.high - 1},
            patch_s=statistics.median(patching),
            noise=watch.noise.to_dict(),
        )
        print(
            f"{workload.name:14} {model:7} {peer:16} {1e3 * summary.median:9.3f} ms {1e6 * over:+8.0f} µs", flush=True
        )
    print(f"{workload.name:14} {model:7} patch            {1e3 * statistics.median(patching):9.3f} ms", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure all of WORKLOADS."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=SUITE, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="for each workload")
    options = parser.parse_args(arguments)
    torch.set_num_threads(machine.cores())
    writer = Writer(options.output)
    writer.write("environment", **machine.environment())
    for name, model in WORKLOADS:
        measure(writer, find_workload(name), model, options.seconds)


if __name__ == "__main__":
    main()
