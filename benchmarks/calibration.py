"""Whether the intervals are true: the same code as two peers, again and again, and how often they seem to differ.

A speed-up that says 1.00 with an interval around it is right about two equal peers where 1 lies in the interval. It
should in nineteen of twenty repetitions, and has to in nine of ten.
"""

from benchmarks import models
from benchmarks.harness import one_call, timed
from benchmarks.peers import PEERS, Setting
from benchmarks.results import Record, Writer
from benchmarks.workloads import find_workload
from bertfast.measure import Ratio, Summary

WORKLOAD, MODEL, PEER, PRECISION = "1x128", "minilm", "hf-sdpa", "float32"
REPETITIONS = 20
_SECONDS = 20.0  # for one of them at most


def run(writer: Writer, device: str, threads: int, repetitions: int = REPETITIONS, model: str = MODEL) -> Record:
    """Prepare the peer twice and time both, many times; prints what came out and returns its record."""
    stock = models.build(model)
    (batch,) = find_workload(WORKLOAD).batches(stock.config.vocab_size)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    setting = Setting(stock, "", PRECISION, device, batch, threads)
    within, overlapping, noisy, ratios = 0, 0, 0, []
    for _ in range(repetitions):
        runs = {name: PEERS[PEER].prepare(setting) for name in ("first", "second")}
        calls = {name: lambda run=run: run(batch) for name, run in runs.items()}
        for call in calls.values():
            one_call(call, device)
        found = timed(calls, device, _SECONDS)
        ratio = Ratio.of(found.seconds["first"], found.seconds["second"])
        first, second = (Summary.of(found.seconds[name]) for name in calls)
        within += ratio.low <= 1 <= ratio.high
        overlapping += first.low <= second.high and second.low <= first.high
        noisy += found.noise.noisy
        ratios.append([ratio.value, ratio.low, ratio.high])
    print(f"{PEER} against itself: equal within the speed-up's interval in {within} of {repetitions} repetitions")
    return writer.write(
        "calibration",
        workload=WORKLOAD,
        model=model,
        peer=PEER,
        precision=PRECISION,
        device=device,
        repetitions=repetitions,
        within=within,
        overlapping=overlapping,
        noisy=noisy,
        ratios=ratios,
    )
