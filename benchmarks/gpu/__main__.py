"""The whole GPU pass in one command, safe under a limit of time.

    python -m benchmarks.gpu [--output DIR] [--budget 560] [--phases ops,encoder] [--quick] [--device cpu] [--fresh]

Every phase runs in a process of its own with a deadline; one that crashes or hangs is recorded, the item that it was at
is passed over, and the pass goes on. Results go to DIR/results.jsonl line by line as they come, everything printed to
DIR/log.txt, and the table at the end to DIR/report.txt. Called again with the same DIR, it takes up where it was cut
off; --fresh begins anew, --retry repeats what failed.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import report, worker
from benchmarks.gpu.plan import PHASES, Context, phase
from benchmarks.gpu.results import FAILED

RESULTS = Path(__file__).parent.parent / "results"
ROOT = Path(__file__).parent.parent.parent
RESTARTS = 8  # of one phase, after crashes
SHORTEST = 12.0  # seconds that a phase is given at least, as long as there are so many
IMPORTS = 60.0  # seconds that a process may take to begin
MARGIN = 5.0  # seconds before its end in which a process begins nothing, its own start counted in
LEAST = 8.0  # seconds without which no process is started


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / f"gpu-{time.strftime('%Y-%m-%d', time.gmtime())}")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--phases", default=",".join(PHASES), help=f"of {', '.join(PHASES)}; default all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--quick", action="store_true", help="the smallest shapes, to see that everything runs")
    parser.add_argument("--fresh", action="store_true", help="forget what is in the output folder")
    parser.add_argument("--retry", action="store_true", help="repeat what failed, crashed or hung")
    parser.add_argument("--stall", type=float, help="seconds without a word after which an item is taken for hung")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a phase, in this very process
    return parser.parse_args(arguments)


def main() -> int:
    """Run the phases and print the table; returns the exit code."""
    arguments = parse()
    context = Context(arguments.device, arguments.quick, arguments.output, arguments.budget)
    if arguments.worker:
        return worker.run(arguments.worker, context)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        for name in ("results.jsonl", "log.txt", "report.txt"):
            (arguments.output / name).unlink(missing_ok=True)
    names = [name for name in arguments.phases.split(",") if name]
    for i, name in enumerate(names):
        if arguments.retry:
            context.results.forget(name, ended=FAILED)
        if name == "build" and context.device == "cuda" and not any((ROOT / "bertfast").glob("_cuda*.so")):
            context.results.forget(name)  # it was built on a machine that is gone
        if not context.results.complete(name):
            left = max(context.left() - 3, 0)
            share = left * phase(name).weight / sum(phase(n).weight for n in names[i:])
            run_phase(name, context, max(share, min(SHORTEST, left)), arguments.stall)
    text = report.render(context.results.read())
    (arguments.output / "report.txt").write_text(text)
    print(text)
    return 0


def run_phase(name: str, context: Context, seconds: float, stall: float | None) -> None:
    """The phase, in as many processes as it takes, for so many seconds."""
    begin = time.monotonic()
    results = context.results
    for _ in range(RESTARTS + 1):
        left = seconds - (time.monotonic() - begin)
        if left < LEAST:
            results.append(phase=name, status="cut")
            return
        ended = run_process(name, context, left, stall or phase(name).stall)
        if ended == "complete":
            return
        at = results.in_flight(name)
        print(f"[{name}] {ended}{f' at {at}' if at else ''} after {time.monotonic() - begin:.0f} s", flush=True)
        if ended == "cut":
            results.append(phase=name, status="cut")
            return
        status = "hung" if ended == "hung" else "crashed"
        if at is None and ended != f"exit code {worker.BROKEN}":
            lines = (context.output / "log.txt").read_text(errors="replace").split("\n")
            said = next((line for line in reversed(lines) if line.strip()), "")
            results.append(phase=name, status=status, error=f"{ended}, at no item: {said[:300]}")
            return
        if at is not None:
            results.append(phase=name, key=at, status=status, error=ended)


def run_process(name: str, context: Context, seconds: float, stall: float) -> str:
    """Run one process of the phase to its end or ours. Returns "complete", "cut", "hung" or what it died of."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", name, "--device", context.device]
    command += ["--output", str(context.output), "--budget", f"{seconds - MARGIN:.1f}"]
    command += ["--quick"] * context.quick
    results, begin = context.results.path, time.monotonic()
    size = results.stat().st_size if results.exists() else 0
    spoken, patience = begin, max(stall, IMPORTS)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Where other processes of this package look for it, and for the tests' helpers beside it.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with (context.output / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, preexec_fn=_die_with_parent
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                now = time.monotonic()
                if results.exists() and results.stat().st_size != size:
                    spoken, size, patience = now, results.stat().st_size, stall
                if now - begin > seconds:
                    return "cut"
                if now - spoken > patience:
                    return "hung"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode == worker.CUT:
        return "cut"
    return "complete" if process.returncode == worker.COMPLETE else f"exit code {process.returncode}"


def _die_with_parent() -> None:
    """So that nothing goes on writing results behind a pass that was killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
