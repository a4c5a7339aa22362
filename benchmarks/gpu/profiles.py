"""Phase 7: the three kernels that are furthest from their roofline, looked at closely.

PyTorch's profiler says which kernels a call runs, and Nsight Compute, where it is there, what keeps them busy. Both go
to the log; the record keeps the table of kernels.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.cases import lists
from benchmarks.cases.case import Case
from benchmarks.gpu.plan import Context, Item
from bertfast import backend

WORST = 3
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")


def items(context: Context) -> Iterator[Item]:
    """The profiler's tables first, then Nsight Compute's."""
    chosen = worst(context)
    for case, name in chosen:
        yield Item(f"kernels of {case.key} on {name}", lambda c=case, n=name: kernels(context, c, n), least=5)
    if context.device == "cuda" and shutil.which("ncu"):
        for case, name in chosen:
            yield Item(f"ncu of {case.key} on {name}", lambda c=case, n=name: nsight(c, n), least=20)


def worst(context: Context) -> list[tuple[Case, str]]:
    """Those with the smallest share of the roofline in half precision, at sizes that fill the card."""
    known = {case.key: case for case in lists.all_cases(context.device, context.quick)}
    shares = []
    for record in context.results.read("ops"):
        best = record.get("best")
        if best is None or record.get("key") not in known or (record["dtype"] != "bfloat16" and not context.quick):
            continue
        time = record["times"][best]
        if time["microseconds"] > 10 or context.quick:
            shares.append((time.get("share_of_roofline", 0.0), record["key"], best))
    return [(known[key], name) for _, key, name in sorted(shares)[:WORST]]


def kernels(context: Context, case: Case, name: str) -> dict[str, Any]:
    """The kernels of a call, by PyTorch's profiler."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if context.device == "cuda" else [kinds.CPU]
    with backend.use(name):
        call = case.call(case.ours, case.inputs(0))
        for _ in range(3):
            call()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(5):
                call()
            if context.device == "cuda":
                torch.cuda.synchronize()
    averages = profile.key_averages()
    by = "self_device_time_total" if context.device == "cuda" else "self_cpu_time_total"
    print(case.key, averages.table(sort_by=by, row_limit=15), sep="\n")
    events = [e for e in averages if context.device == "cpu" or e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: -getattr(e, by))
    return {"kernels": [[e.key[:100], e.count, round(getattr(e, by) / 5, 2)] for e in events[:10]]}


def nsight(case: Case, name: str) -> dict[str, Any]:
    """Nsight Compute on a call of its own process. The clocks stay as they are found."""
    sections = [word for section in _SECTIONS for word in ("--section", section)]
    command = ["ncu", "--clock-control", "none", "--launch-count", "6", "--profile-from-start", "off", *sections]
    done = subprocess.run(
        [*command, sys.executable, "-m", "benchmarks.gpu.profiles", case.key, name],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    print(done.stdout)
    if done.returncode:
        raise RuntimeError(f"ncu ended with {done.returncode}: {done.stdout[-400:]}")
    wanted = ("Duration", "Memory Throughput", "DRAM Throughput", "Compute (SM) Throughput", "Achieved Occupancy")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    return {"metrics": [line for line in lines if line.startswith(wanted)][:40]}


def main() -> int:
    """One call between the profiler's start and stop: what Nsight Compute is run on."""
    key, name = sys.argv[1:3]
    case = next(c for c in lists.all_cases("cuda", False) if c.key == key)
    with backend.use(name):
        call = case.call(case.ours, case.inputs(0))
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
