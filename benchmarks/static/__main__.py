"""`python -m benchmarks.static`: a table of the kernels' machine code, and what is wrong with it."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET is set: unset it, a process that interprets kernels cannot compile them")

from benchmarks.static import baseline, cases, compilation, cuda
from benchmarks.static.architectures import ARCHITECTURES
from benchmarks.static.baseline import Key, Row
from benchmarks.static.capture import Kernel, kernels


def triton_rows(architectures: Sequence[int]) -> tuple[list[Row], list[str]]:
    """The cases on each of these GPUs, and what of the kernels no case reaches."""
    launched: list[tuple[Key, bool, Kernel]] = []
    unreached = []
    for architecture in architectures:
        here = [
            (case, k)
            for case in cases.cases(architecture)
            for k in kernels(case.call, architecture)[: 1 if case.main else None]
        ]
        for case, k in here:
            launched.append((Key(compilation.version(), k.name, case.name, architecture), case.half, k))
        unreached += [f"sm_{architecture}: {what}" for what in cases.unreached(architecture, [k for _, k in here])]
    made = compilation.compiled([k for *_, k in launched])
    return [Row(key, m, half) for (key, half, _), m in zip(launched, made, strict=True)], unreached


def table(rows: list[Row]) -> str:
    """One line for each kernel in each case."""
    head = ["sm", "kernel", "case", "registers", "stack", "shared", "occupancy"]
    head += ["instructions", "loop", "loads", "stores", "matrix", "bulk", "special"]
    lines = [head]
    for key, m, _ in rows:
        line = [str(key.architecture), key.kernel, key.case]
        if m.code is None:
            lines.append([*line, m.error, *[""] * (len(head) - 4)])
            continue
        c = m.code
        loads = dict(sorted((Counter(c.loads) + Counter(c.copies)).items(), reverse=True))
        matrix = " ".join(f"{name}:{count}" for name, count in c.matrix.items())
        numbers = [m.registers, m.stack, m.shared, f"{m.occupancy:.2f}", c.instructions, c.loop or ""]
        lines.append(
            [*line, *map(str, numbers), _widths(loads), _widths(c.stores), matrix, str(c.bulk), str(c.special)]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(word.ljust(w) for word, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _widths(widths: dict[int, int]) -> str:
    return " ".join(f"{width}:{count}" for width, count in widths.items())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--check", action="store_true", help="no table; exit with 1 where something is wrong")
    does.add_argument("--update", action="store_true", help="write the baseline anew")
    parser.add_argument("--architectures", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", choices=("triton", "cuda"), help="what one of the compilers makes")
    options = parser.parse_args()
    began, rows, wrong = time.monotonic(), [], []
    if options.only != "cuda":
        rows, wrong = triton_rows(options.architectures)
    if options.only != "triton":
        try:
            rows += cuda.rows(options.architectures)
        except cuda.Unavailable as reason:
            print(f"the CUDA kernels are left out: {reason}")
    if not options.check:
        print(table(rows))
    found = {row.key: row.violations() for row in rows}
    if options.update:
        baseline.write(rows)
    else:
        before = baseline.read()
        for compiler in {row.key.compiler for row in rows} - baseline.compilers(before):
            known = ", ".join(sorted(baseline.compilers(before))) or "none"
            print(f"nothing of {compiler} is compared: the baseline is of {known}")
        for key, reasons in baseline.regressions(rows, before).items():
            found.setdefault(key, []).extend(reasons)
    for key, reasons in found.items():
        wrong += [f"sm_{key.architecture} {key.kernel}, {key.case or 'any case'}: {reason}" for reason in reasons]
    print("\n".join(wrong))
    print(f"{len(rows)} kernels, {len(wrong)} violations, {time.monotonic() - began:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
