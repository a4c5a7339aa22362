"""The benchmarks' results: a README that says what was measured."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
from benchmarks import encoder, table

README = Path(table.README).read_text()


def test_the_readme_shows_the_committed_results_and_no_others():
    assert table.placed(README, table.render(table.newest())) == README


def test_results_in_the_readme_say_where_they_are_from():
    for line in table.newest().values():
        environment = line["environment"]
        assert environment["commit"] and not environment["commit"].endswith("dirty") and environment["threads"]
        assert line["milliseconds"]["stock"]["n"] >= encoder.LEAST_ROUNDS
