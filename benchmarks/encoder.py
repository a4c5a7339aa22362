"""The encoder's forward on the CPU: Hugging Face's own (sdpa) against the same model patched, in interleaved runs.

    python -m benchmarks.encoder [--seconds 40] [--dtype float32 bfloat16] [--workload NAME ...]

For each workload and dtype: accuracy against the same weights in float64 first, then time, then the peak of memory
that a forward takes for its tensors. One JSON line each goes to benchmarks/results/encoder.jsonl.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, BertConfig, BertModel

import bertfast
from benchmarks.workloads import Workload, encoder_workloads, minilm_folder
from bertfast import measure

RESULTS = Path(__file__).parent / "results" / "encoder.jsonl"
# The least speed-up over Hugging Face sdpa in the same precision that a release has to reach.
GOALS = {
    ("1x16", "float32"): 2.4,
    ("1x128", "float32"): 1.5,
    ("8x128 full", "float32"): 1.2,
    ("32x128 ragged", "float32"): 2.9,
    ("64 sentences", "float32"): 3.5,
    ("1x16", "bfloat16"): 1.5,
    ("1x128", "bfloat16"): 1.3,
    ("8x128 full", "bfloat16"): 1.15,
    ("32x128 ragged", "bfloat16"): 2.6,
}
LEAST_ROUNDS = 7  # a median of fewer has no interval to speak of
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(model: str, dtype: torch.dtype) -> torch.nn.Module:
    """The stock model in evaluation mode; BERT-base has random weights, which time and parity do not mind."""
    torch.manual_seed(0)
    if model == "bert-base":
        stock = BertModel(BertConfig(attn_implementation="sdpa"))
    else:
        stock = AutoModel.from_pretrained(minilm_folder(), attn_implementation="sdpa")
    return stock.eval().to(dtype)


def errors(gold: torch.Tensor, actual: torch.Tensor, valid: torch.Tensor) -> dict[str, float]:
    """The largest and the mean absolute error of the last hidden state on valid tokens, and the worst cosine."""
    difference = (actual.double() - gold)[valid].abs()
    pooled = [(t.double() * valid[..., None]).sum(1) for t in (gold, actual)]
    return {
        "max": difference.max().item(),
        "mean": difference.mean().item(),
        "cosine": torch.cosine_similarity(*pooled, dim=-1).min().item(),
    }


@torch.no_grad()
def run(workload: Workload, dtype: str, seconds: float, models: dict[str, torch.nn.Module]) -> dict:
    """Accuracy, time and memory of one workload."""
    batch = workload.batch()
    valid = batch["attention_mask"].bool()
    gold = copy.deepcopy(models["stock"]).double()(**batch).last_hidden_state
    accuracy = {name: errors(gold, model(**batch).last_hidden_state, valid) for name, model in models.items()}
    calls = {name: (lambda model=model: model(**batch)) for name, model in models.items()}
    times = measure.interleave(calls, seconds=seconds, warmup=2)
    missing = LEAST_ROUNDS - len(times["stock"])
    if missing > 0:
        for name, more in measure.interleave(calls, rounds=missing, warmup=0).items():
            times[name] += more
    ratio = measure.Ratio.of(times["stock"], times["bertfast"])
    unpacked = measure.Ratio.of(times["stock"], times["bertfast without packed weights"])
    return {
        "benchmark": "encoder",
        "workload": workload.name,
        "model": workload.model,
        "dtype": dtype,
        "tokens": workload.tokens,
        "fill": round(workload.fill, 3),
        "milliseconds": {
            k: {"median": round(1e3 * measure.Summary.of(t).median, 3), "n": len(t)} for k, t in times.items()
        },
        "speedup": {"value": round(ratio.value, 3), "low": round(ratio.low, 3), "high": round(ratio.high, 3)},
        "speedup_without_packed_weights": round(unpacked.value, 3),
        "goal": GOALS.get((workload.name, dtype)),
        "error": accuracy,
        "peak_bytes": {name: measure.peak_memory(call) for name, call in calls.items()},
        "packed_bytes": sum(b.packed_bytes for b in bertfast.explain(models["bertfast"]).backbones),
        "environment": measure.environment(),
    }


def main() -> None:
    """Run the chosen workloads and append one line each to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="time for the rounds of one workload")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--workload", nargs="+", help="names; default all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workloads = {w.name: w for w in encoder_workloads()}
    wanted = arguments.workload or list(workloads)
    if unknown := set(wanted) - set(workloads):
        raise SystemExit(f"unknown workload {', '.join(sorted(unknown))}: choose from {', '.join(workloads)}")
    for dtype in arguments.dtype:
        for name in wanted:
            stock = load(workloads[name].model, DTYPES[dtype])
            models = {
                "stock": stock,
                "bertfast": bertfast.patch(copy.deepcopy(stock)),
                "bertfast without packed weights": bertfast.patch(copy.deepcopy(stock), pack_weights=False),
            }
            line = run(workloads[name], dtype, arguments.seconds, models)
            with arguments.output.open("a") as results:
                results.write(json.dumps(line) + "\n")
            value, low, high = line["speedup"].values()
            print(f"{name:14} {dtype:9} {value:.2f}x ({low:.2f} to {high:.2f}), goal {line['goal']}", file=sys.stderr)


if __name__ == "__main__":
    main()
