"""Time a model before and after bertfast.patch on the same batches, in turn, after checking that the numbers agree.

Texts are cut into tokens once and batched in the order they come in, each batch padded to its longest text, as callers
of transformers do. Every round runs one batch through both models; who goes first alternates. Rounds go on until both
medians are known to --precision or the time is over. Ratios are of medians of the same rounds. Exit status: 0, or 1
where the check fails (then nothing is timed).
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bertfast.cli.files import read_texts
from bertfast.cli.output import UsageError, print_json, print_table, progress_bar
from bertfast.cli.stock import DTYPES, Batch, Calls, Comparison, forward, load_stock, positions
from bertfast.cli.tokens import length_limit, load_tokenizer, pad
from bertfast.measure import PRECISION, Ratio, Summary, converged, environment, interleave, peak_memory
from bertfast.noise import Watch
from bertfast.patching import explain

HELP = "how much faster is a patched model, on your texts?"

_TEXTS = 256
_CHECKED = 2, 8  # batches and texts of each that are checked before timing
_SECONDS = 60.0


class UnequalError(UsageError):
    """The patched model does not compute what stock code does."""

    status = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory, or the id of a hub repository")
    parser.add_argument("--texts", metavar="FILE", help=f"UTF-8 lines to run (default: {_TEXTS} made here)")
    parser.add_argument("--batch-size", type=_positive(int), default=32, metavar="N")
    parser.add_argument("--max-length", type=_positive(int), metavar="N", help="cut texts to so many tokens")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=_positive(int), metavar="N", help="of PyTorch (default: its own choice)")
    parser.add_argument("--rounds", type=_positive(int), metavar="N", help="run all batches N times")
    parser.add_argument("--seconds", type=_positive(float), metavar="S", help=f"stop after S (default: {_SECONDS:g})")
    parser.add_argument(
        "--precision",
        type=_positive(float),
        metavar="P",
        help=f"stop once the medians' 95 %% intervals are under P %% of them (default: {100 * PRECISION:g}, "
        "or as many rounds as --rounds says)",
    )
    parser.add_argument("--no-pack-weights", dest="pack_weights", action="store_false", help="patch without them")
    parser.add_argument("--json", action="store_true", help="JSON lines: environment, workload, stock, patched, ratio")


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be greater than 0, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def run(args: argparse.Namespace) -> int:
    texts = read_texts(args.texts, _TEXTS)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        return _bench(args, texts)
    finally:
        torch.set_num_threads(before)


def _bench(args: argparse.Namespace, texts: list[str]) -> int:
    dtype = DTYPES[args.dtype]
    stock = load_stock(args.model, dtype)
    tokenizer = load_tokenizer(args.model)
    max_length = length_limit(tokenizer, positions(stock), args.max_length)
    features = tokenizer.encode(texts, None, max_length)
    chunks = [features[i : i + args.batch_size] for i in range(0, len(features), args.batch_size)]
    batches = [pad(chunk, tokenizer.pad_id) for chunk in chunks]

    comparison = Comparison(stock, dtype, args.pack_weights)
    count, size = _CHECKED
    for batch in batches[:count]:
        comparison.add({k: t[:size] for k, t in batch.items()})
    if comparison.failures or not comparison.ran_fused:
        why = ", ".join(comparison.failures) or "the fused path did not run"
        raise UnequalError(f"nothing is timed, because the check failed ({why}): see bertfast check {args.model}")
    models = {"stock": stock, "patched": comparison.patched}
    del comparison.gold
    before = Calls.of(comparison.patched)

    calls = {name: partial(forward, model) for name, model in models.items()}
    seconds = args.seconds or (None if args.rounds else _SECONDS)
    rounds = args.rounds and args.rounds * len(batches)
    precision = args.precision and args.precision / 100
    if precision is None and rounds is None:
        precision = PRECISION
    with progress_bar(100, "timing", args.json) as bar, Watch() as watch:
        times = interleave(
            calls,
            rounds=rounds,
            seconds=seconds,
            precision=precision,
            warmup=min(2, len(batches)),
            items=batches,
            progress=lambda share: bar.update(100 * share - bar.n),
        )
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    memory = {name: peak_memory(partial(forward, model, largest)) for name, model in models.items()}

    done = [batches[r % len(batches)] for r in range(len(times["stock"]))]
    ran = Calls.of(comparison.patched) - before
    records = [
        {"record": "environment", **environment()},
        {"record": "workload", "model": args.model, "dtype": args.dtype, "batch_size": args.batch_size}
        | {"max_length": max_length, "pack_weights": args.pack_weights, **describe(texts, batches)},
    ]
    for name in models:
        known = {"converged": converged({name: times[name]}, precision or PRECISION)}
        records.append({"record": name, **speed(times[name], done), **known, "peak_memory_bytes": memory[name]})
    ratio = Ratio.of(times["stock"], times["patched"])
    records[-1] |= {"packed_weights_bytes": sum(b.packed_bytes for b in explain(comparison.patched).backbones)}
    interval = {"speedup": ratio.value, "low": ratio.low, "high": ratio.high}
    records.append({"record": "ratio", **interval, **ran.to_dict(), "noise": watch.noise.to_dict()})
    if args.json:
        for record in records:
            print_json(record)
    else:
        _print({record["record"]: record for record in records}, str(ran))
        print(watch.noise)
    return 0


def describe(texts: Sequence[str], batches: Sequence[Batch]) -> dict[str, Any]:
    """The workload in numbers. padding: the share of the rectangles that is padding, which patched models save."""
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    tokens, positions_ = int(lengths.sum()), sum(batch["input_ids"].numel() for batch in batches)
    return {
        "texts": len(texts),
        "batches": len(batches),
        "tokens": tokens,
        "median_length": int(lengths.median()),
        "longest": int(lengths.max()),
        "padding": 1 - tokens / positions_,
    }


def speed(times: Sequence[float], batches: Sequence[Batch]) -> dict[str, float]:
    """Throughput and latency of these rounds, in units a second and in milliseconds a batch."""
    summary, total = Summary.of(times), sum(times)
    return {
        "sequences_per_s": sum(len(batch["input_ids"]) for batch in batches) / total,
        "tokens_per_s": sum(int(batch["attention_mask"].sum()) for batch in batches) / total,
        "p50_ms": summary.median * 1e3,
        "p50_low_ms": summary.low * 1e3,
        "p50_high_ms": summary.high * 1e3,
        "p90_ms": summary.p90 * 1e3,
        "p99_ms": summary.p99 * 1e3,
        "rounds": summary.n,
    }


def _print(records: dict[str, dict[str, Any]], calls: str) -> None:
    env, work, ratio = records["environment"], records["workload"], records["ratio"]
    torch_version = env["versions"]["torch"]
    print(f"{work['model']} in {work['dtype']} on {env['cpu']}, {env['threads']} threads, torch {torch_version}")
    print(
        f"{work['texts']} texts of {work['median_length']} tokens (median) to {work['longest']}, "
        f"{work['batches']} batches of up to {work['batch_size']}, {work['padding']:.0%} padding\n"
    )
    sides = [records["stock"], records["patched"]]

    def line(label: str, key: str, form: str, factor: float = 1.0) -> tuple[str, ...]:
        return (label, *(format(side[key] * factor, form) for side in sides))

    print_table(
        [
            ("", "stock", "patched"),
            line("sequences/s", "sequences_per_s", ",.1f"),
            line("valid tokens/s", "tokens_per_s", ",.0f"),
            line("p50 ms a batch", "p50_ms", ",.2f"),
            line("p90", "p90_ms", ",.2f"),
            line("p99", "p99_ms", ",.2f"),
            line("peak memory of a forward, MB", "peak_memory_bytes", ",.1f", 1e-6),
            ("packed weights, MB", "-", f"{sides[1]['packed_weights_bytes'] / 1e6:,.1f}"),
        ]
    )
    rounds = sides[0]["rounds"]
    # Fewer rounds than this hold no 95 % interval.
    interval = (
        f"95 %: {ratio['low']:.2f} to {ratio['high']:.2f}" if rounds > 5 else "no interval: give it more --seconds"
    )
    print(f"\nspeedup {ratio['speedup']:.2f}x ({interval}; {rounds} interleaved rounds)")
    print(f"calls: {calls}")
