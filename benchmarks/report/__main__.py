"""What the results say: the README's tables, plots, one HTML page; or what changed between two of them.

    python -m benchmarks.report [FILE] [--check] [--html FILE] [--plots FOLDER]
    python -m benchmarks.report --compare A B

Of everything in FILE (benchmarks/results/suite.jsonl) the newest line is taken. The README is written from the
committed results only, between its markers; plots/ and report.html go beside FILE. --check writes nothing and exits
with 1 where the README says something else. A and B are files of results, or FILE@RUN for one run in a file; exit
status 1 is a significant regression. Exit status 2 is bad input.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from benchmarks import results
from benchmarks.report import comparison, markdown, page, plots
from benchmarks.report.lines import IDENTITY, Lines
from bertfast.cli.output import print_table

README = Path(__file__).parent.parent.parent / "README.md"
REQUIRED = {"run", "status", "reason", *IDENTITY}
OK, DIFFERENT, MISUSED, PIPE_CLOSED = 0, 1, 2, 141


class BadInput(Exception):
    """One line: what was given is of no use, and what would be."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"{self.prog}: {message} (see --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    found = _Parser(
        prog="python -m benchmarks.report", description=__doc__, usage=argparse.SUPPRESS, formatter_class=formatter
    )
    found.add_argument("file", nargs="?", type=Path, default=results.SUITE, metavar="FILE")
    found.add_argument("--check", action="store_true", help="write nothing; fail where the README differs")
    found.add_argument("--html", type=Path, metavar="FILE", help="the page (default: report.html beside the results)")
    found.add_argument("--plots", type=Path, metavar="FOLDER", help="(default: plots/ beside the results)")
    found.add_argument("--compare", nargs=2, metavar=("A", "B"), help="FILE or FILE@RUN, before and after")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write, check or compare; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.compare:
            status = compare(*options.compare)
            sys.stdout.flush()
            return status
        lines = read(options.file)
        if options.check:
            return check(lines)
        return write(lines, options)
    except BadInput as error:
        return complain(str(error))
    except BrokenPipeError:  # whoever read the comparison has seen enough; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def complain(message: str) -> int:
    """One line on stderr."""
    print(f"python -m benchmarks.report: {message}", file=sys.stderr)
    return MISUSED


def read(path: Path, run: str | None = None) -> Lines:
    """What a file, or one run in it, has to show. BadInput where there is nothing."""
    try:
        environments, measurements = results.read(path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}: name a file that python -m benchmarks wrote") from error
    except KeyError as error:
        raise BadInput(f"{path}: a line without {error}: python -m benchmarks did not write that") from error
    if run is not None:
        if run not in environments:
            raise BadInput(f"{path}: no run {run!r}: choose from {', '.join(environments) or 'none'}")
        measurements = [line for line in measurements if line["run"] == run]
    whole = [line for line in measurements if line.keys() >= REQUIRED]
    if len(whole) < len(measurements):
        complain(f"{path}: passed over {len(measurements) - len(whole)} measurements that do not say of what they are")
    if not whole:
        raise BadInput(f"{path}: no measurements in it: run python -m benchmarks")
    return Lines(environments, whole)


def write(lines: Lines, options: argparse.Namespace) -> int:
    """Everything there is to write; what cannot be written is said, and the rest goes on."""
    status, folder = OK, options.file.parent
    if options.file.resolve() == results.SUITE.resolve():
        try:
            README.write_text(markdown.placed(README.read_text(encoding="utf-8"), lines), encoding="utf-8")
        except ValueError as error:
            status = complain(str(error))
    drawn = draw(lines)
    try:
        for plot in drawn:
            plot.write(options.plots or folder / "plots")
    except OSError as error:
        status = complain(f"no plots: {error}")
    try:
        (options.html or folder / "report.html").write_text(page.render(lines, drawn), encoding="utf-8")
    except OSError as error:
        status = complain(f"no page: {error}")
    return status


def draw(lines: Lines) -> list[plots.Plot]:
    """The plots, having said which there are none of."""
    if importlib.util.find_spec("matplotlib") is None:
        complain("no plots: matplotlib is not installed: pip install 'bertfast[plots]'")
        return []
    drawn = plots.draw(lines)
    if missing := [kind for kind in plots.KINDS if not any(plot.name.startswith(kind) for plot in drawn)]:
        print(f"left out, because no lines have what they show: {', '.join(missing)}")
    return drawn


def check(lines: Lines) -> int:
    """Whether the README says what the lines say."""
    readme = README.read_text(encoding="utf-8")
    try:
        wanted = markdown.placed(readme, lines)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if readme != wanted:
        complain("the README's results are not those that are committed: run me without --check")
    return DIFFERENT if readme != wanted else OK


def compare(a: str, b: str) -> int:
    """Print what changed from a to b."""
    before, after = (read(*side(text)) for text in (a, b))
    found = comparison.changes(before, after)
    if not any(change.ratio for change in found):
        raise BadInput(f"nothing was measured both in {a} and in {b}")
    for part in comparison.report(before, after, found):
        print(part) if isinstance(part, str) else print_table(part)
    return DIFFERENT if any(change.verdict in comparison.REGRESSIONS for change in found) else OK


def side(text: str) -> tuple[Path, str | None]:
    """FILE or FILE@RUN; a file may have an @ in its name."""
    path, _, run = text.rpartition("@")
    return (Path(text), None) if not path or Path(text).exists() else (Path(path), run)


if __name__ == "__main__":
    sys.exit(main())
