"""Phase 2: the record that stands beside all results."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.plan import Context, Item
from bertfast import machine

_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
_TOOLS = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump")


def items(context: Context) -> Iterator[Item]:
    """One record."""
    yield Item("environment", lambda: {"environment": record(context)})


def record(context: Context) -> dict[str, Any]:
    """Hardware, driver, clocks, versions, commit, and the tools there are."""
    import torch

    found = {**machine.environment(), "tools": [tool for tool in _TOOLS if shutil.which(tool)]}
    if context.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "nvidia_smi": smi(),
        }
    return found


def smi() -> dict[str, str] | None:
    """Driver and clocks, as nvidia-smi reads them."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return dict(zip(_QUERY.split(","), (v.strip() for v in done.stdout.splitlines()[0].split(",")), strict=False))
