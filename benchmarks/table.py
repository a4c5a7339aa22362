"""The README's results, from the committed lines and from nothing else.

    python -m benchmarks.table [--check]

Takes the newest line of each workload and dtype in benchmarks/results/encoder.jsonl and writes the table between the two
markers of the README; with --check writes nothing and exits with 1 where the README says something else.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.encoder import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- results: "
END = "<!-- end of results -->"
WHAT = {
    "1x16": "BERT-base, 1 × 16",
    "1x128": "BERT-base, 1 × 128",
    "8x128 full": "BERT-base, 8 × 128, no padding",
    "32x128 ragged": "BERT-base, 32 × ≤ 128, 42 % full",
    "64 sentences": "all-MiniLM-L6-v2 (real weights), 64 real sentences",
}


def newest() -> dict[tuple[str, str], dict]:
    """The last committed line of each (workload, dtype)."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {(line["workload"], line["dtype"]): line for line in lines}


def render(lines: dict[tuple[str, str], dict]) -> str:
    """The markdown between the markers."""
    any_line = next(iter(lines.values()))
    environment = any_line["environment"]
    out = [
        f"One forward on the CPU, Hugging Face (sdpa) against the same model patched, in the same precision: {environment['cpu']}, "
        f"{environment['threads']} threads, PyTorch {environment['versions']['torch']}, transformers "
        f"{environment['versions']['transformers']}; interleaved runs, ratio of medians with its 95 % interval. Errors are the largest "
        "of the last hidden state on valid tokens against the same weights in float64.",
        "",
        "| workload | dtype | Hugging Face | bertfast | speed-up | without packed weights | error: Hugging Face / bertfast | activations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload, name in WHAT.items():
        for dtype in ("float32", "bfloat16"):
            line = lines.get((workload, dtype))
            if line is None:
                continue
            ms, s, peak, error = line["milliseconds"], line["speedup"], line["peak_bytes"], line["error"]
            out.append(
                f"| {name} | {dtype} | {ms['stock']['median']:.1f} ms | {ms['bertfast']['median']:.1f} ms "
                f"| **{s['value']:.2f}×** ({s['low']:.2f}–{s['high']:.2f}) | {line['speedup_without_packed_weights']:.2f}× "
                f"| {error['stock']['max']:.1e} / {error['bertfast']['max']:.1e} "
                f"| {peak['bertfast'] / peak['stock']:.0%} |"
            )
    return "\n".join(out)


def placed(readme: str, table: str) -> str:
    """The README with the table between its markers."""
    begin = readme.index("\n", readme.index(BEGIN)) + 1
    return f"{readme[:begin]}{table}\n{readme[readme.index(END) :]}"


def main() -> int:
    """Write or check the README's table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the README differs")
    arguments = parser.parse_args()
    readme = README.read_text()
    wanted = placed(readme, render(newest()))
    if arguments.check:
        if readme != wanted:
            print(
                "the README's results are not those of benchmarks/results: run python -m benchmarks.table",
                file=sys.stderr,
            )
        return int(readme != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
