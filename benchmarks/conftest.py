"""The op benches' options, parameters and results: `pytest benchmarks/bench_norm.py --benchmark-only`.

Each bench module has `cases(shape, dtype, device)`; every case makes a group of benches, one for each peer and then one
for each backend. pytest-benchmark times one after the other, so its table tells how long each takes, not how they
compare: the ratios at the end are measured in interleaved rounds, and only they are to be quoted.
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import measurement, shapes
from benchmarks.cases.candidates import Candidate, Group, candidates
from benchmarks.cases.case import DTYPES, Case
from benchmarks.cases.memory import release
from benchmarks.results import Writer
from bertfast.backend import BACKENDS
from bertfast.machine import environment
from bertfast.noise import Noise, Watch

SECONDS = {"quick": 0.02, "full": 0.5}  # of a bench, about


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("op benches")
    group.addoption("--op-shapes", choices=SECONDS, default="quick", help="quick (a minute in all) or full")
    group.addoption("--op-backends", type=_names("backend", BACKENDS), help="all that are for the device, by default")
    group.addoption("--op-dtypes", type=_names("dtype", DTYPES), help="all that the device's kernels have, by default")
    group.addoption("--op-compiled", action="store_true", help="PyTorch's operations compiled, as a further peer")
    group.addoption("--op-output", type=Path, metavar="FILE", help="append the results to FILE as JSON lines")


def _names(what: str, known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Parses names with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
        return names

    return parse


class Session:
    """What the options ask for, and what lasts from bench to bench: the case at hand and the results."""

    def __init__(self, config: pytest.Config) -> None:
        # The defaults are for `pytest .`, which finds this file too late to ask for its options.
        self.set: str = config.getoption("op_shapes", "quick")
        self.compiled: bool = config.getoption("op_compiled", False)
        self._backends: tuple[str, ...] | None = config.getoption("op_backends", None)
        self._dtypes: tuple[str, ...] | None = config.getoption("op_dtypes", None)
        self._output: Path | None = config.getoption("op_output", None)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._writer: Writer | None = None
        self._group: Group | None = None
        self.records: list[dict[str, Any]] = []
        self.noise: Noise | None = None

    def cases(self, of: Callable[[shapes.Shape, str, str], Iterable[Case]]) -> list[Case]:
        """A bench module's cases at the shapes and dtypes asked for: each once, though batches share their tokens."""
        found: dict[str, Case] = {}
        for shape in shapes.SHAPES[self._device][self.set]:
            for dtype in self._dtypes or shapes.DTYPES[self._device]:
                for case in of(shape, dtype, self._device):
                    found.setdefault(case.key, case)
        return list(found.values())

    def backends(self, case: Case) -> tuple[str, ...]:
        """Those that are asked to run the case."""
        return self._backends or case.backends

    def group(self, case: Case) -> Group:
        """What the benches of this case share; that of the case before is let go."""
        if self._group is None or self._group.case is not case:
            self._group = None
            if self._device == "cuda" or self.compiled:  # elsewhere it frees nothing and takes a tenth of a second
                release()
            self._group = Group(case, self.backends(case), SECONDS[self.set])
        return self._group

    def record(self, **fields: Any) -> None:
        """Keep the line, and write it where there is a file for it."""
        self.records.append(fields)
        if self._output is not None:
            if self._writer is None:
                self._writer = Writer(self._output)
                self._writer.write("environment", **environment())
            self._writer.write("op", **fields)

    def end(self, noise: Noise) -> None:
        """The last line: what else the machine did."""
        self.noise = noise
        if self._writer is not None:
            self._writer.write("noise", **noise.to_dict())


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "candidate" not in metafunc.fixturenames:
        return
    session = metafunc.config.stash[SESSION]
    limits = {"max_time": SECONDS[session.set], "min_time": measurement.LEAST_SECONDS, "min_rounds": 5}
    params = [
        pytest.param(each, id=f"{case.key} {each.name}", marks=pytest.mark.benchmark(group=case.key, **limits))
        for case in session.cases(metafunc.module.cases)
        for each in candidates(case, session.backends(case), session.compiled)
    ]
    metafunc.parametrize("candidate", params)


@pytest.fixture(scope="session")
def watch(request: pytest.FixtureRequest) -> Iterator[None]:
    """Over all benches, because one alone is shorter than what the system counts by."""
    with Watch() as watch:
        yield
    request.config.stash[SESSION].end(watch.noise)


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture, candidate: Candidate, request: pytest.FixtureRequest, watch: None
) -> Callable[[], None]:
    """Measures the candidate that the bench was given."""
    session = request.config.stash[SESSION]
    return lambda: measurement.measure(benchmark, session.group(candidate.case), candidate, session.record)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    rows = [record for record in session.records if record.get("ratio_to")]
    if not rows:
        return
    terminalreporter.section("the best peer's time over ours, in interleaved rounds")
    for r in rows:
        key = f"{r['op']} {r['shape']} {r['dtype']} {r['direction']}"
        t = r["ratio_to"]
        words = f"{r['backend']:9} {t['value']:.2f} ({t['low']:.2f}–{t['high']:.2f}) of {t['peer']}"
        terminalreporter.write_line(f"{key:62} {words}")
    terminalreporter.write_line(str(session.noise))
