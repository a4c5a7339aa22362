"""What the README's table still takes from here; `python -m benchmarks` measures."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "encoder.jsonl"
LEAST_ROUNDS = 7
