"""Results as a run of the benchmarks writes them, made up: known speeds with known noise, from a seed."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bertfast.measure import Summary

WORKLOADS = {  # tokens, padded positions, sequences, seconds that Hugging Face takes in float32 and base
    "1x16": (16, 16, 1, 0.06),
    "8x128": (1024, 1024, 8, 1.3),
    "32x128 ragged": (1720, 4096, 32, 4.3),
    "rerank 32 pairs": (4096, 8192, 32, 8.0),
    **{f"length {n}": (8 * n, 8 * n, 8, 0.001 * n) for n in (64, 16, 256)},
    **{f"batch {n}": (32 * n, 32 * n, n, 0.03 * n) for n in (16, 1, 4)},
    **{f"scaling {n}": (27 * n, 64 * n, n, 0.01 * n) for n in (1024, 1, 16)},
    "train 8x128": (1024, 1024, 8, 6.7),
}
PEERS = {  # how many times as fast as Hugging Face in float32, by precision
    "hf-sdpa": {"float32": 1.0, "bfloat16": 2.0},
    "hf-eager": {"float32": 0.9, "bfloat16": 1.7},
    "onnxruntime-int8": {"int8": 3.2},
    "openvino": {"float32": 1.2, "bfloat16": 2.4},
    "bertfast-unpacked-weights": {"float32": 1.1, "bfloat16": 2.2},
    "bertfast": {"float32": 2.0, "bfloat16": 5.0},
}
SKIPPED = {("ctranslate2", "float32"): "ctranslate2 is not installed: pip install 'bertfast[bench]'"}
INACCURATE = {("onnxruntime-int8", "int8", "8x128"): "the error of 1.2 is above 0.5"}
TRAINABLE = ("hf-sdpa", "hf-eager", "bertfast")
FLOPS_PER_TOKEN, BYTES = 4e7, 3.4e8


def environment(run: str, **changes: Any) -> dict[str, Any]:
    """The first line of a run."""
    return {
        "schema": 2,
        "record": "environment",
        "run": run,
        "time": f"2026-12-0{run[-1]}T10:00:00Z",
        "platform": "Linux",
        "cpu": "AMD EPYC",
        "cpu_features": ["avx2"],
        "cores": 2,
        "threads": 2,
        "gpus": [],
        "versions": {"python": "3.11.7", "bertfast": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "native_cpu_isa": "avx512",
        "native_cpu_missing": None,
        "variables": {},
        "commit": f"{run[-1] * 40}",
        "ceilings": {"copy": 3.3e10, "float32": 2.2e11, "bfloat16": 4.5e11, "int8": 8e11},
        **changes,
    }


def measurements(
    run: str,
    workloads: tuple[str, ...] = tuple(WORKLOADS),
    peers: tuple[str, ...] = (*PEERS, "ctranslate2"),
    slower: dict[str, float] | None = None,
    rounds: int = 15,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A line for each workload, peer and precision; slower: by which factor some peers are."""
    draw = np.random.default_rng(seed)
    found = []
    for workload in workloads:
        tokens, padded, sequences, base = WORKLOADS[workload]
        training = workload.startswith("train")
        head = "sequence" if "rerank" in workload else ""
        times: dict[tuple[str, str], list[float]] = {}
        for peer in peers:
            for precision in [p for q, p in SKIPPED if q == peer] or PEERS[peer]:
                line = {"schema": 2, "record": "measurement", "run": run}
                line |= {"benchmark": "training" if training else "inference", "workload": workload, "model": "base"}
                line |= {"head": head, "peer": peer, "precision": precision, "device": "cpu", "status": "measured"}
                line |= {"reason": ""}
                if training and peer not in TRAINABLE:
                    continue
                if reason := SKIPPED.get((peer, precision)):
                    found.append(line | {"status": "skipped", "reason": reason})
                    continue
                if reason := INACCURATE.get((peer, precision, workload)):
                    found.append(line | {"status": "inaccurate", "reason": reason})
                    continue
                speed = PEERS[peer][precision] * (padded / tokens if peer.startswith("bertfast") else 1.0)
                seconds = base / speed * (slower or {}).get(peer, 1.0) * draw.lognormal(0.0, 0.01, rounds)
                times[peer, precision] = seconds.tolist()
                found.append(line | numbers(seconds.tolist(), tokens, padded, sequences, precision))
                stock = times.get(("hf-sdpa", precision)) or times.get(("hf-sdpa", "float32"))
                if stock:
                    ratio = float(np.median(stock) / np.median(seconds))
                    found[-1]["speedup"] = {"value": ratio, "low": 0.99 * ratio, "high": 1.01 * ratio}
                if wide := times.get(("hf-sdpa", "float32")):
                    ratio = float(np.median(wide) / np.median(seconds))
                    found[-1]["speedup_over_float32"] = {"value": ratio, "low": 0.98 * ratio, "high": 1.02 * ratio}
                if (peer, workload) == ("bertfast", "1x16"):
                    found[-1] |= {"goal": {"float32": 2.4, "bfloat16": 4.0}[precision], "goal_over": "float32"}
    return found


def numbers(seconds: list[float], tokens: int, padded: int, sequences: int, precision: str) -> dict[str, Any]:
    """What a line has that was measured."""
    summary = Summary.of(seconds)
    error = {"float32": 3e-6, "bfloat16": 5e-2, "int8": 1e-1}[precision]
    flops = FLOPS_PER_TOKEN * tokens
    return {
        "sequences": sequences,
        "tokens": tokens,
        "padded": padded,
        "error": {"max": error, "mean": error / 8, "cosine": 0.9999},
        "error_limit": 2 * error,
        "prepare_s": 1.2,
        "first_call_s": 0.4,
        "seconds": seconds,
        "median_s": summary.median,
        "low_s": summary.low,
        "high_s": summary.high,
        "p90_s": summary.p90,
        "p99_s": summary.p99,
        "converged": True,
        "device_s": None,
        "joules": None,
        "peak_bytes": 3000 * tokens,
        "tokens_per_s": tokens / summary.median,
        "sequences_per_s": sequences / summary.median,
        "baseline": "hf-sdpa",
        "speedup": None,
        "speedup_over_float32": None,
        "flops": flops,
        "bytes": BYTES + 1e5 * tokens,
        "roofline_share": flops / summary.median / 2.2e11,
        "noise": {"others": 0.01, "steal": 0.0, "noisy": False},
        "goal": None,
        "goal_over": None,
        "roofline_goal": None,
    }


def write(path: Path, *records: list[dict[str, Any]] | dict[str, Any]) -> Path:
    """These records, or lists of them, as a file of results."""
    flat = [r for part in records for r in (part if isinstance(part, list) else [part])]
    path.write_text("".join(json.dumps(record) + "\n" for record in flat))
    return path
