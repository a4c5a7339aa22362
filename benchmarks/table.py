"""The README's results, from the committed lines and from nothing else.

    python -m benchmarks.table [--check]

Takes the newest line of each workload and dtype in benchmarks/results/encoder.jsonl and writes the table between the
two markers of the README; with --check writes nothing and exits with 1 where the README says something else.
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
    environment = next(iter(lines.values()))["environment"]
    versions = environment["versions"]
    columns = (
        *("workload", "dtype", "Hugging Face", "bertfast", "speed-up", "goal", "without packed weights"),
        *("error: Hugging Face / bertfast", "activation memory"),
    )
    rows = [
        row(name, dtype, lines[workload, dtype])
        for workload, name in WHAT.items()
        for dtype in ("float32", "bfloat16")
        if (workload, dtype) in lines
    ]
    return "\n".join(
        [
            f"One forward on the CPU ({environment['cpu']}, {environment['threads']} threads,",
            f"PyTorch {versions['torch']}, transformers {versions['transformers']}): Hugging Face with sdpa against",
            "the same model patched, in the same precision. Interleaved runs, ratio of medians with its 95 % interval.",
            "Errors are the largest of the last hidden state on valid tokens against the same weights in float64;",
            "activation memory is the peak of a forward against Hugging Face's. Why a goal is missed stands in",
            "[benchmarks/NOTES.md](benchmarks/NOTES.md).",
            "",
            f"| {' | '.join(columns)} |",
            f"|{'---|' * len(columns)}",
            *(f"| {' | '.join(cells)} |" for cells in rows),
        ]
    )


def row(name: str, dtype: str, line: dict) -> tuple[str, ...]:
    """The cells of one workload and dtype."""
    ms, speedup, peak, error = line["milliseconds"], line["speedup"], line["peak_bytes"], line["error"]
    return (
        name,
        dtype,
        f"{ms['stock']['median']:.1f} ms",
        f"{ms['bertfast']['median']:.1f} ms",
        f"**{speedup['value']:.2f}×** ({speedup['low']:.2f}–{speedup['high']:.2f})",
        "–" if line["goal"] is None else f"{line['goal']}×",
        f"{line['speedup_without_packed_weights']:.2f}×",
        f"{error['stock']['max']:.1e} / {error['bertfast']['max']:.1e}",
        f"{peak['bertfast'] / peak['stock']:.0%}",
    )


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
