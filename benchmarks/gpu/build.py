"""Phase 1: build and install the package with its native modules, for the GPU in hand alone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Context, Item

ROOT = Path(__file__).parent.parent.parent


def items(context: Context) -> Iterator[Item]:
    """The build, and what came of it."""
    if context.device == "cuda":
        yield Item("install", lambda: install(context))
    yield Item("modules", modules)


def install(context: Context) -> dict[str, Any]:
    """pip install in place; RuntimeError with the end of the output where it fails."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", "."]
    environment = {**os.environ, "BERTFAST_CUDA": "1"}
    if "BERTFAST_CUDA_ARCHS" not in environment:
        environment["BERTFAST_CUDA_ARCHS"] = architecture()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(done.stdout)
    if done.returncode:
        raise RuntimeError(f"pip install failed: {done.stdout[-500:]}")
    return {"command": " ".join(command[1:]), "architectures": environment["BERTFAST_CUDA_ARCHS"]}


def architecture() -> str:
    """The GPU's, as the build names it: "90a" for an H200."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def modules() -> dict[str, Any]:
    """Which native modules load, and why not."""
    from bertfast import native

    return {"cpu": native.cpu_reason or "loads", "cuda": native.cuda_reason or "loads"}
