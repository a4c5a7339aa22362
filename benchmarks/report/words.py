"""Names and numbers as people read them."""

import re
from typing import Any

MODELS = {"base": "BERT-base", "large": "BERT-large", "minilm": "MiniLM-L6"}
KINDS = {" full": "", " ragged": "≤ "}  # what a workload's name says of its lengths, and how that is shown


def model(name: str) -> str:
    """A model's name, or that of a checkpoint's folder."""
    return f"all-{family(name)}-v2 (real weights)" if name == "minilm" else family(name)


def family(name: str) -> str:
    """The same in a few characters."""
    return MODELS.get(name, name.rstrip("/").rsplit("/", 1)[-1])


def workload(line: dict[str, Any]) -> str:
    """The model, the workload's name, and how much of the rectangle is text: "BERT-base, 32 × ≤ 128, 42 % full"."""
    return f"{model(line['model'])}, {sequences(line)}"


def title(line: dict[str, Any]) -> str:
    """The same in two lines."""
    return f"{family(line['model'])}\n{sequences(line)}"


def brief(line: dict[str, Any]) -> str:
    """The same in a few characters."""
    return crosses(line["workload"]) + ("" if line["model"] == "base" else f", {family(line['model'])}")


def sequences(line: dict[str, Any]) -> str:
    """Which sequences, and how full: "32 × ≤ 128, 42 % full"; a line that was not measured does not know the latter."""
    name, longest = line["workload"], ""
    for kind, sign in KINDS.items():
        if name.endswith(kind):
            name, longest = name.removesuffix(kind), sign
    if line.get("sequences", 1) == 1:
        return crosses(name, longest)
    full = "no padding" if line["tokens"] == line["padded"] else f"{percent(line['tokens'] / line['padded'])} full"
    return f"{crosses(name, longest)}, {full}"


def crosses(name: str, longest: str = "") -> str:
    """ "32x128" as "32 × 128"."""
    return re.sub(r"(?<=\d)x(?=\d)", f" × {longest}", name)


def commit(environment: dict[str, Any]) -> str:
    """Twelve figures of the commit that was measured, and whether files differed from it."""
    whole = environment["commit"] or "unknown"
    return whole[:12] + "-dirty" * whole.endswith("-dirty")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def times(ratio: float) -> str:
    """A ratio to three figures or so."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def duration(seconds: float) -> str:
    """Milliseconds, or seconds from ten of them on."""
    return f"{1e3 * seconds:.{1 if seconds >= 0.01 else 2}f} ms" if seconds < 10 else f"{seconds:.1f} s"


def count(number: float) -> str:
    """A whole number in groups of three, or to three figures where it is small."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def size(number: float) -> str:
    """Bytes."""
    return _prefixed(number, "B", ("", "k", "M", "G", "T"))


def rate(per_second: float, unit: str) -> str:
    """A rate, as in "215 GFLOP/s"."""
    return _prefixed(per_second, f"{unit}/s", ("", "k", "M", "G", "T", "P"))


def _prefixed(number: float, unit: str, prefixes: tuple[str, ...]) -> str:
    """Three figures and the prefix that fits."""
    for prefix in prefixes:
        if number < 999.5 or prefix == prefixes[-1]:
            break
        number /= 1000
    return f"{number:.3g} {prefix}{unit}"
