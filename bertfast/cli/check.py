"""Compare a model before and after bertfast.patch, output by output, and say whether the numbers are the same.

Both are compared with stock code in float64 on the same weights. The verdict is PASS where no output of the patched
model is further from that than twice stock's own error (or rounding: 2e-5 in float32, one unit in the last place in
bfloat16), and the fused path ran at all. Exit status: 0 for PASS, 1 for FAIL.
"""

import argparse
from typing import Any

from bertfast.cli.files import read_texts
from bertfast.cli.output import print_json, print_table, progress_bar
from bertfast.cli.stock import DTYPES, Batch, Comparison, load_stock, positions
from bertfast.cli.tokens import Tokenizer, length_limit, load_tokenizer, pad

HELP = "does a patched model compute the same?"

_TEXTS = 48
_BATCH_SIZE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory, or the id of a hub repository")
    parser.add_argument("--texts", metavar="FILE", help="UTF-8 lines to run (default: English made here)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    texts = read_texts(args.texts, _TEXTS)
    dtype = DTYPES[args.dtype]
    stock = load_stock(args.model, dtype)
    tokenizer = load_tokenizer(args.model)
    batches = make_batches(texts, tokenizer, length_limit(tokenizer, positions(stock), None))
    comparison = Comparison(stock, dtype)
    with progress_bar(len(batches), "comparing", args.json, "batch") as bar:
        for batch in batches:
            comparison.add(batch)
            bar.update()
    report = summarize(comparison, args.model, args.dtype, len(texts))
    if args.json:
        print_json(report)
    else:
        _print(report, str(comparison.calls))
    return 0 if report["verdict"] == "PASS" else 1


def make_batches(texts: list[str], tokenizer: Tokenizer, max_length: int) -> list[Batch]:
    """Padded batches of mixed lengths; in every other one each text has the next for a partner, for token types."""
    batches = []
    for number, start in enumerate(range(0, len(texts), _BATCH_SIZE)):
        chunk = texts[start : start + _BATCH_SIZE]
        pairs = [*chunk[1:], chunk[0]] if number % 2 else None
        batches.append(pad(tokenizer.encode(chunk, pairs, max_length), tokenizer.pad_id))
    return batches


def summarize(comparison: Comparison, model: str, dtype: str, texts: int) -> dict[str, Any]:
    """The verdict and all that led to it."""
    rows = {
        name: {
            "patched_max": row.patched.largest,
            "patched_mean": row.patched.mean,
            "stock_max": row.stock.largest,
            "stock_mean": row.stock.mean,
            "limit": row.limit(comparison.dtype),
            "pass": name not in comparison.failures,
        }
        for name, row in comparison.rows.items()
    }
    reasons = [f"{name} is further off than {rows[name]['limit']:.2g}" for name in comparison.failures]
    if not comparison.ran_fused:
        reasons.append("the fused path never ran: stock code was compared with itself")
    return {
        "model": model,
        "dtype": dtype,
        "texts": texts,
        "verdict": "FAIL" if reasons else "PASS",
        "reasons": reasons,
        **comparison.calls.to_dict(),
        "min_cosine": comparison.min_cosine,
        "errors": rows,
    }


def _print(report: dict[str, Any], calls: str) -> None:
    print(f"{report['model']} in {report['dtype']}, {report['texts']} texts; errors against stock code in float64\n")
    header = ("", "patched max", "mean", "stock max", "mean", "limit", "")
    keys = ("patched_max", "patched_mean", "stock_max", "stock_mean", "limit")
    lines = [
        (name, *(f"{row[key]:.2e}" for key in keys), "ok" if row["pass"] else "FAIL")
        for name, row in report["errors"].items()
    ]
    print_table([header, *lines])
    print(f"\nsmallest cosine of mean-pooled embeddings  {report['min_cosine']:.8f}")
    print("calls of the patched model                 " + calls)
    for reason, count in report["not_packed"].items():
        print(f"  {count} not packed: {reason}")
    print(f"\n{report['verdict']}" + "".join(f"\n  {reason}" for reason in report["reasons"]))
