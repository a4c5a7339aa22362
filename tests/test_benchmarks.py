"""The committed results: a README that shows them and nothing else, and what has to hold for them to be believed."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
from benchmarks import harness, results
from benchmarks.report import markdown, tables
from benchmarks.report.__main__ import read

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def records():
    return results.records(results.SUITE)


def test_the_readme_shows_the_committed_results_and_no_others():
    readme = README.read_text()
    assert markdown.placed(readme, read(results.SUITE)) == readme
    assert all(f"<!-- end of results {name} -->" in readme for name in markdown.BLOCKS)


def test_results_say_where_they_are_from(records):
    runs = {r["run"]: r for r in records if r["record"] == "environment"}
    assert all(r["commit"] and not r["commit"].endswith("dirty") and r["threads"] for r in runs.values())
    measured = [r for r in records if r.get("status") == "measured"]
    assert measured and all(r["run"] in runs for r in measured)


def test_ratios_in_the_readme_are_of_enough_rounds_without_noise():
    ours = tables.tabled(read(results.SUITE), peer="bertfast", status="measured")
    ours = [r for r in ours if r["benchmark"] != "memory"]  # which is exact
    assert ours and all(len(r["seconds"]) >= harness.LEAST_ROUNDS and not r["noise"]["noisy"] for r in ours)


def test_the_harness_costs_next_to_nothing(records):
    costs = [r["share"] for r in records if r["record"] == "harness" and r["share"] is not None]
    assert costs and max(costs) <= 0.01


def test_intervals_are_true_in_nine_of_ten_repetitions(records):
    calibrations = [r for r in records if r["record"] == "calibration"]
    assert calibrations and all(r["within"] >= 0.9 * r["repetitions"] for r in calibrations)
