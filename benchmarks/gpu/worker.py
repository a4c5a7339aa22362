"""One phase in a process of its own, item by item."""

import importlib
import sys
import time
import traceback

from benchmarks.gpu.plan import Context, phase

COMPLETE, BROKEN, CUT = 0, 70, 75  # exit codes: all items ended, this process can do no more, time is over


def run(name: str, context: Context) -> int:
    """Run what the results do not have yet; returns the exit code."""
    results, module = context.results, importlib.import_module(phase(name).module)
    device = device_name(context.device)
    results.append(phase=name, status="begun")
    if hasattr(module, "run"):
        return module.run(name, context)
    ended = results.ended(name)
    for item in module.items(context):
        if item.key in ended:
            continue
        if context.left() < item.least:
            return CUT
        results.append(phase=name, key=item.key, status="started")
        begin = time.perf_counter()
        try:
            record = {"status": "done", **item.run()}
        except Exception as error:
            traceback.print_exc()
            record = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:600]}
        seconds = round(time.perf_counter() - begin, 2)
        results.append(phase=name, key=item.key, device=device, seconds=seconds, **record)
        print(f"[{name}] {item.key}: {record['status']} in {seconds} s", flush=True)
        if record["status"] == "failed" and not alive(context.device):
            return BROKEN  # an illegal access ends every later call: a fresh process goes on behind this item
    results.append(phase=name, status="complete")
    return COMPLETE


def device_name(device: str) -> str:
    """What the records say about where they were taken: "cpu", or the GPU's name."""
    if device == "cpu":
        return device
    import torch

    return torch.cuda.get_device_name()


def alive(device: str) -> bool:
    """Whether the GPU still answers this process."""
    if device == "cpu":
        return True
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the GPU answers no more: {error}", file=sys.stderr)
        return False
    return True
