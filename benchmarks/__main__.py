"""The benchmark suite: everybody who computes a BERT, on the same workloads, in the same run.

    python -m benchmarks [--set quick|full] [--workload NAME ...] [--model NAME ...] [--peer NAME ...] [--texts FILE]
    python -m benchmarks --calibrate

Accuracy against the stock model in float64 comes first, and what is off is not timed; then interleaved rounds until
every median is known to 3 % or the time is over. Results are appended to benchmarks/results/suite.jsonl as they come.
Exit status: 0, or 1 where bertfast itself fails or is inaccurate, or 2 where something that was named does not exist.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import calibration, ceilings, models
from benchmarks.harness import Case, Harness
from benchmarks.peers import PEERS, Peer, chosen
from benchmarks.results import SUITE, Writer
from benchmarks.workloads import SERIES, SETS, Workload, file_workload, find_workload, workloads
from bertfast import machine
from bertfast.noise import Watch

BASELINE = "hf-sdpa"
SECONDS = {"quick": 270.0, "full": 3500.0}
PRECISIONS = ("float32", "bfloat16", "float16", "int8")
_SLOW = {"cpu": "float16", "cuda": ""}  # which no kernels are made for
# Those that are ready within seconds: all that the quick set has time for, and what the curves are drawn of.
SHORTLIST = (BASELINE, "bertfast", "onnxruntime", "onnxruntime-int8", "openvino", "ctranslate2")

ENGINES = ("onnxruntime", "openvino", "nncf", "ctranslate2", "flash-attn")  # whose versions stand in the results
TRAINERS = ("hf-eager", "compile")  # and in training, where every compilation takes a minute


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=SETS, default="quick", help="what to measure, where no workload is named")
    parser.add_argument("--workload", nargs="+", metavar="NAME", help=f"of {', '.join(workloads())}")
    parser.add_argument("--model", nargs="+", metavar="NAME", help=f"of {', '.join(models.MODELS)}, or a checkpoint")
    parser.add_argument("--peer", nargs="+", metavar="NAME", help=f"of {', '.join(PEERS)}, beside the baseline")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: all that the device has")
    parser.add_argument("--texts", nargs=1, type=Path, metavar="FILE", help="a workload of its UTF-8 lines")
    parser.add_argument("--baseline", metavar="PEER", default=BASELINE, help=f"whom to compare with ({BASELINE})")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"for everything; {SECONDS} where not said")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch and of the engines (default: the cores)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", default=SUITE)
    parser.add_argument("--calibrate", action="store_true", help="run the same code as two peers instead, many times")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; returns the exit status."""
    begin, options = time.monotonic(), parse(arguments)
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        return _complain(f"--seconds must be greater than 0, not {options.seconds:g}")
    if options.threads is not None and options.threads < 1:
        return _complain(f"--threads must be at least 1, not {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        return _complain("there is no GPU that PyTorch sees: leave --device out")
    torch.set_num_threads(options.threads or machine.cores())
    cases, status = _cases(options)
    if not cases:
        return _complain("nothing is left to measure")
    writer = Writer(options.output)
    with Watch() as watch:
        limits = {} if options.calibrate else ceilings.measured(options.device)
    writer.write("environment", **machine.environment(ENGINES), ceilings=limits, ceilings_noise=watch.noise.to_dict())
    if options.calibrate:
        calibration.run(writer, options.device, torch.get_num_threads())
        return status
    seconds = options.seconds or SECONDS[options.set]
    harness = Harness(
        writer,
        options.precision or [p for p in PRECISIONS if p != _SLOW[options.device]],
        device=options.device,
        threads=torch.get_num_threads(),
        baseline=options.baseline,
        seconds=max(seconds - (time.monotonic() - begin), 1.0),
        ceilings=limits,
        say=lambda line: print(line, flush=True),
    )
    harness.run(cases)
    return status if harness.right else 1


def _cases(options: argparse.Namespace) -> tuple[list[Case], int]:
    """What to measure, and the exit status: 2 where a name stands for nothing, of which a line is said each."""
    status = 0

    def existing(find: Callable[[Any], Any], names: Iterable[Any]) -> list[Any]:
        nonlocal status
        found = []
        for name in names:
            try:
                found.append(find(name))
            except (ValueError, OSError) as error:
                status = _complain(str(error))
        return found

    named = existing(find_workload, options.workload or ()) + existing(file_workload, options.texts or ())
    if options.workload or options.texts:
        pairs = [(workload, model) for workload in named for model in options.model or ["base"]]
    else:
        wanted = _of_set(options.set, options.model)
        pairs = [(workload, model) for name, model in wanted for workload in existing(find_workload, [name])]
        status = 0  # nobody asked for these by name
    known = existing(models.check, dict.fromkeys(model for _, model in pairs))
    peers = existing(lambda name: chosen([name])[0], dict.fromkeys([options.baseline, *(options.peer or PEERS)]))
    return [Case(w, m, _few(peers, options, w, m)) for w, m in pairs if m in known], status


def _of_set(name: str, wanted: Sequence[str] | None) -> list[tuple[str, str]]:
    """The set's workloads on these models; one that the set does not know gets what BERT-base gets."""
    pairs = SETS[name]
    if wanted is None:
        return pairs
    known = {model for _, model in pairs}
    return [(w, m) for m in wanted for w, model in pairs if model == (m if m in known else "base")]


def _few(peers: list[Peer], options: argparse.Namespace, workload: Workload, model: str) -> list[Peer]:
    """The peers of a case: those named; else all, or the short list where there is no time or no memory for all."""
    curve = any(workload.name in names.values() for names in SERIES.values())
    if options.peer or not (options.set == "quick" or curve or workload.training or model == "large"):
        return peers
    few = SHORTLIST + (TRAINERS if workload.training and options.set == "full" else ())
    return [peer for peer in peers if peer.name in (*few, options.baseline)]


def _complain(line: str) -> int:
    """Say what is wrong; returns the exit status for that."""
    print(f"benchmarks: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
