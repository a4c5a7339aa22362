"""The short table at the end of a pass, from its results and from nothing else."""

from collections import Counter
from typing import Any

from benchmarks.gpu.results import ENDED

MOST = 12_000  # characters

Records = list[dict[str, Any]]


def render(records: Records) -> str:
    """All sections, the most telling first; what does not fit any more is cut off at the end."""
    sections = (phases, goals, encoder, preferences, failures, ceilings, profiles, ops)
    text = "\n\n".join(filter(None, (section(records) for section in sections)))
    return text if len(text) <= MOST else text[: MOST - 40].rsplit("\n", 1)[0] + "\n(cut: the rest is in results.jsonl)"


def last(records: Records, phase: str) -> Records:
    """The last word on each item of a phase, where it ended."""
    found = {r["key"]: r for r in records if r.get("phase") == phase and "key" in r and r["status"] in ENDED}
    return list(found.values())


def done(records: Records, phase: str) -> Records:
    """The items of a phase that went well."""
    return [r for r in last(records, phase) if r["status"] == "done"]


def phases(records: Records) -> str:
    """Where it ran, and what became of each phase."""
    lines = []
    for record in done(records, "environment")[-1:]:
        e = record["environment"]
        versions = ", ".join(f"{n} {e['versions'].get(n)}" for n in ("torch", "triton", "transformers"))
        lines.append(f"{record['device']}; {versions}; commit {(e['commit'] or 'unknown')[:12]}; {e['time']}")
    for name in dict.fromkeys(r["phase"] for r in records):
        outcomes = Counter(r.get("outcome", r["status"]) for r in last(records, name))
        words = [r["status"] for r in records if r["phase"] == name and "key" not in r and r["status"] != "begun"]
        counts = ", ".join(f"{n} {what}" for what, n in outcomes.items()) or "nothing ended"
        lines.append(f"{name:12} {words[-1] if words else 'under way':9} {counts}")
    return "\n".join(lines)


def goals(records: Records) -> str:
    """How many goals were met, by phase."""
    found = [g for name in ("ops", "encoder") for r in done(records, name) for g in r.get("goals", ())]
    met = Counter(g["met"] for g in found)
    return f"goals: {met[True]} met, {met[False]} missed, {met[None]} without a value" if found else ""


def mark(record: dict[str, Any]) -> str:
    """The record's goals in a few characters."""
    words = []
    for g in record.get("goals", ()):
        value = "-" if g["value"] is None else f"{g['value']:.2f}"
        words.append(f"{'ok' if g['met'] else 'MISSED'} {value} of {g['target']:g}")
    return "; ".join(words)


def encoder(records: Records) -> str:
    """The rows of the encoder phase."""
    lines = []
    for r in done(records, "encoder"):
        wall = {n: t["median"] for n, t in r["wall_milliseconds"].items()}
        gpu = {n: g["milliseconds"] for n, g in r["gpu"].items()}
        busy = f"gpu {gpu[r['peer']]:.2f}/{gpu['bertfast']:.2f} ms {r['ratios']['gpu']:.2f}x" if gpu else "gpu -"
        wrong = "" if r["accuracy"]["accurate"] else " NOT ACCURATE"
        lines.append(
            f"{r['row'][:34]:34} {r['peer']:8} wall {wall[r['peer']]:.2f}/{wall['bertfast']:.2f} ms "
            f"{r['ratios']['wall']:.2f}x  {busy}  {mark(r)}{wrong}"
        )
    return "\n".join(["encoder: the other / bertfast", *lines]) if lines else ""


def ops(records: Records) -> str:
    """A line for each case."""
    lines = []
    for r in done(records, "ops"):
        if "op" not in r:
            continue
        wrong = [n for n, a in r["accuracy"].items() if "refused" not in a and not a["accurate"]]
        if r["best"] is None:
            lines.append(f"{r['key']}: {'WRONG: ' + ', '.join(wrong) if wrong else 'nothing runs it'}")
            continue
        best = r["times"][r["best"]]
        rate = f"{best['tflops']:.0f} TF/s" if r["flops"] else f"{best['gb_per_second']:.0f} GB/s"
        others = [
            f"{n} {r['times'][n]['microseconds']:.1f}" for n in r["accuracy"] if n != r["best"] and n in r["times"]
        ]
        share = f"{best['share_of_roofline']:.0%}" if "share_of_roofline" in best else "-"
        peer = f"{r['best_peer']} {r['ratio']:.2f}x" if r["best_peer"] else ""
        notes = [" warm"] * (not r["cold"]) + [" eager"] * (best["how"] == "eager")
        rights = f" WRONG: {', '.join(wrong)}" if wrong else ""
        time = f"{r['best']} {best['microseconds']:.1f} us {rate} {share}{''.join(notes)}"
        lines.append(f"{short(r['key'])}: {time} | {', '.join(others)} | {peer} | {mark(r)}{rights}")
    return (
        "\n".join(["ops: best of ours, its rate, share of the roofline | ours | best peer | goal", *lines])
        if lines
        else ""
    )


SHORT = {
    "residual_layer_norm": "norm",
    "embed_layer_norm": "embed",
    "varlen_attention": "attention",
    "bias_gelu": "gelu",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "forward + backward": "f+b",
    "forward": "f",
    "backward": "b",
}


def short(key: str) -> str:
    """A key in fewer characters."""
    for long, word in SHORT.items():
        key = key.replace(long, word)
    return key


def ceilings(records: Records) -> str:
    """The ceilings."""
    lines = []
    for r in done(records, "ceilings"):
        rate = f"{r['gb_per_second']:.0f} GB/s" if r["key"] == "copy" else f"{r['tflops']:.0f} TFLOP/s"
        lines.append(f"{r['key']}: {rate}")
    return "ceilings: " + "; ".join(lines) if lines else ""


def preferences(records: Records) -> str:
    """What the measurements say the static choices should be, as lines to copy."""
    lines, seen = [], {}
    for r in done(records, "ops"):
        times = r.get("times", {})
        if r["device"] == "cpu" or not {"cuda", "triton"} <= set(times):
            continue
        ratio = times["cuda"]["microseconds"] / times["triton"]["microseconds"]
        if r["op"].startswith("linear"):
            rows, *sizes = r["shape"].split("x")
            seen.setdefault((r["op"], *sizes), {})[int(rows)] = ratio
        elif ratio > 1.03:
            lines.append(f"{r['key']}: triton is {ratio:.2f}x as fast as cuda")
    for (op, columns, depth), by_rows in seen.items():
        won = []
        for rows in sorted(by_rows, reverse=True):
            if by_rows[rows] <= 1.03:  # less is within the noise
                break
            won.append(rows)
        if won:
            lines.append(f'TRITON_FROM[MAJOR, "{op.split()[1]}", {columns}, {depth}] = {won[-1]}')
    return "\n".join(["choices that the times ask for (backend.PREFERENCES, ops.linear):", *lines]) if lines else ""


def profiles(records: Records) -> str:
    """The worst kernels."""
    lines = []
    for r in done(records, "profiles"):
        for name, _, microseconds in r.get("kernels", [])[:2]:
            lines.append(f"{r['key']}: {name[:70]} {microseconds} us")
        lines += [f"{r['key']}: {', '.join(r['metrics'][:5])}"] if r.get("metrics") else []
    return "\n".join(["profiles (the log has them whole):", *lines]) if lines else ""


def failures(records: Records) -> str:
    """What failed, crashed or hung."""
    lines = []
    for name in dict.fromkeys(r["phase"] for r in records):
        bad = [r for r in last(records, name) if r["status"] != "done"]
        lines += [f"{name}: {r['key']}: {r['status']}: {r.get('error', '')[:160]}" for r in bad[:6]]
        lines += [f"{name}: and {len(bad) - 6} more"] if len(bad) > 6 else []
        lines += [
            f"{name}: {r['error'][:160]}" for r in records if r["phase"] == name and "key" not in r and "error" in r
        ]
    for r in done(records, "ops"):
        lines += [
            f"ops: {r['key']}: {n}: {a['error'][:120]}"
            for n, a in r.get("accuracy", {}).items()
            if isinstance(a.get("error"), str)
        ]
    return "\n".join(["failures:", *lines]) if lines else ""
