"""Phase 4: the tests that need the GPU, `pytest -m gpu`, one record for each of them as it ends."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import worker
from benchmarks.gpu.plan import Context
from benchmarks.gpu.results import Results

TESTS = Path(__file__).parent.parent.parent / "tests"


class Outcomes:
    """A pytest plugin that leaves out the tests that the results have, and records the others."""

    def __init__(self, name: str, results: Results, context: Context, device: str) -> None:
        self.name, self.results, self.context, self.device = name, results, context, device
        self.cut = False
        self.begun = 0.0
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        ended = self.results.ended(self.name)
        items[:] = [item for item in items if item.nodeid not in ended]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.context.left() < 2:
            self.cut = True
            pytest.exit("the time is over", returncode=worker.CUT)
        self.results.append(phase=self.name, key=nodeid, status="started")
        self.begun, self.failed, self.outcome = time.perf_counter(), [], "passed"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome = "failed"
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.failed += lines[:3] or str(report.longrepr).splitlines()[-1:]
        elif report.skipped and self.outcome == "passed":
            self.outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        seconds = round(time.perf_counter() - self.begun, 2)
        record = {"outcome": self.outcome, "seconds": seconds, "device": self.device}
        if self.failed:
            record["error"] = "; ".join(self.failed)[:600]
        self.results.append(
            phase=self.name, key=nodeid, status="failed" if self.outcome == "failed" else "done", **record
        )


def run(name: str, context: Context) -> int:
    """Run pytest in this process; returns the worker's exit code."""
    os.chdir(TESTS.parent)
    plugin = Outcomes(name, context.results, context, worker.device_name(context.device))
    chosen: list[Any] = ["-m", "gpu", str(TESTS)]
    if context.quick:
        chosen = [str(TESTS / "test_reference.py"), "-k", "dropout or philox"]
    code = pytest.main([*chosen, "-q", "--tb=short", "-p", "no:cacheprovider"], plugins=[plugin])
    if plugin.cut:
        return worker.CUT
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"pytest ended with {code!r}: see log.txt")
    context.results.append(phase=name, status="complete")
    return worker.COMPLETE
