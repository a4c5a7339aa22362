"""The machine and the software in hand: what a measurement has to say about where it was taken."""

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bertfast import native

PACKAGES = ("bertfast", "torch", "transformers", "sentence-transformers", "tokenizers", "triton", "numpy")
# What /proc/cpuinfo calls the instruction sets that matter here.
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "LD_PRELOAD")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Version of Python and of each of the packages; None for those that are not installed. Imports none."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if found.get("bertfast", "") is None:  # run from a checkout that was not installed
        import bertfast

        found["bertfast"] = getattr(bertfast, "__version__", "unknown")
    return found


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as well as it is known."""
    return _cpuinfo(cpuinfo).get("model name") or platform.processor() or platform.machine() or "unknown"


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, bool] | None:
    """Which of CPU_FEATURES the processor has; None where the system does not say (anything but Linux on x86)."""
    flags = _cpuinfo(cpuinfo).get("flags")
    return None if flags is None else {name: name in flags.split() for name in CPU_FEATURES}


@functools.cache
def has_amx() -> bool:
    """Whether this processor multiplies tiles of bfloat16 (Intel, from Sapphire Rapids on)."""
    return bool((cpu_features() or {}).get("amx_bf16"))


def has_bfloat16() -> bool:
    """Whether the processor, on the instruction set in use, multiplies bfloat16."""
    return has_amx() or (native.cpu is not None and native.cpu.isa() == "avx512_bf16")


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's entries."""
    try:
        first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of each GPU that PyTorch sees."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in found]


def git_commit() -> str | None:
    """The commit of the checkout that bertfast is imported from, with "-dirty" behind it where files differ."""
    root = Path(__file__).resolve().parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None

    def output(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = output("rev-parse", "--verify", "HEAD")
        return commit and commit + ("-dirty" if output("status", "--porcelain") else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


def environment(more_packages: Sequence[str] = ()) -> dict[str, Any]:
    """The record that stands beside a measurement: time, hardware, versions, threads, settings, commit."""
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("BERTFAST_") or k in _VARIABLES}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_features": [name for name, there in (cpu_features() or {}).items() if there],
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "versions": versions((*PACKAGES, *more_packages)),
        "native_cpu_isa": None if native.cpu is None else native.cpu.isa(),
        "native_cpu_missing": native.cpu_reason or None,
        "variables": variables,
        "commit": git_commit(),
    }
