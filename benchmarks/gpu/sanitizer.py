"""Phase 8: compute-sanitizer over one small call of every op in both directions, where the tool is there."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.plan import Context, Item

TOOLS = {"memcheck": ["--leak-check", "no"], "racecheck": []}


def items(context: Context) -> Iterator[Item]:
    """One item a tool and backend; without the tool, the calls alone."""
    found = shutil.which("compute-sanitizer") if context.device == "cuda" else None
    backends = ("cuda", "triton") if context.device == "cuda" else ("cpu",)
    for tool, options in TOOLS.items() if found else [("without compute-sanitizer", [])]:
        for backend in backends:
            prefix = [found, "--tool", tool, "--error-exitcode", "9", *options] if found else []
            yield Item(f"{tool} {backend}", lambda p=prefix, b=backend: check(context, p, b), least=10)


def check(context: Context, prefix: list[str], backend: str) -> dict[str, Any]:
    """Run the exercise under the tool. RuntimeError with what it found."""
    command = [*prefix, sys.executable, "-m", "benchmarks.gpu.exercise", backend, context.device]
    # PyTorch's own pool of memory would hide an access just behind a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
    )
    print(done.stdout[-6000:])
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith("=========") or "Error" in line]
        raise RuntimeError(f"exit code {done.returncode}: {' | '.join(lines[:8])}"[:600])
    return {"summary": done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""}
