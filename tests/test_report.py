"""The report: tables, plots and the page say what the lines of results say, and a comparison finds what changed."""

import copy
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic_results as synthetic
from browser import CHROMIUM, Browser

from benchmarks import results
from benchmarks.report import __main__ as report
from benchmarks.report import comparison, lines, markdown, page, precisions, tables, words
from benchmarks.report.cells import Cell
from benchmarks.report.lines import Lines

ALL = ("1x16", "8x128", "32x128 ragged", "rerank 32 pairs")
OURS_HALF = ("bertfast", "bfloat16")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one of everything, and a newer one of two workloads."""
    return synthetic.write(
        tmp_path_factory.mktemp("results") / "suite.jsonl",
        synthetic.environment("run-1"),
        synthetic.measurements("run-1"),
        synthetic.environment("run-2"),
        synthetic.measurements("run-2", ("1x16", "8x128"), seed=1),
    )


@pytest.fixture(scope="module")
def shown(suite: Path) -> Lines:
    return report.read(suite)


@pytest.fixture(scope="module")
def drawn(shown: Lines) -> list:
    pytest.importorskip("matplotlib")
    from benchmarks.report import plots

    return plots.draw(shown)


def one(shown: Lines, **fields: str) -> dict:
    """The only line with these fields."""
    (line,) = shown.where(**fields)
    return line


def cells(table: tables.Table) -> list[dict[str, Cell]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


# The README.


def block(name: str, body: str = "old\n") -> str:
    return f"<!-- results {name}: written by python -m benchmarks.report -->\n{body}<!-- end of results {name} -->"


def test_only_what_stands_between_the_markers_is_written(shown):
    template = "# A\n\n{}\n\nprose of 3.14 times\n\n{}\n\n<!-- results: older -->\n"
    written = markdown.placed(template.format(block("main"), block("peers")), shown)
    assert written == template.format(
        block("main", markdown.render(tables.main(shown)) + "\n"),
        block("peers", markdown.render(tables.peers(shown)) + "\n"),
    )
    assert "old" not in written.replace("bold", "").replace("older", "") and written.count("| workload |") == 4
    assert markdown.placed(written, shown) == written


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        (block("mian"), "'mian': choose from main, precisions, peers, training"),
        (block("main").removesuffix("<!-- end of results main -->"), "no end"),
    ],
)
def test_a_marker_that_means_nothing_is_an_error(shown, readme, message):
    with pytest.raises(ValueError, match=message):
        markdown.placed(readme, shown)


def test_a_block_without_results_says_so():
    assert markdown.placed(block("training"), Lines({}, [])) == block("training", "Not measured yet.\n")


def test_check_compares_and_writes_nothing(shown, suite, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(report, "README", readme)
    readme.write_text(block("main"))
    assert report.main([str(suite), "--check"]) == 1
    assert readme.read_text() == block("main") and "run me without --check" in capsys.readouterr().err
    readme.write_text(markdown.placed(block("main"), shown))
    assert report.main([str(suite), "--check"]) == 0


def test_the_readme_is_written_from_the_committed_results_and_from_no_others(tmp_path, monkeypatch, capsys):
    readme, page_ = tmp_path / "README.md", tmp_path / "report.html"
    mine = synthetic.write(
        tmp_path / "mine.jsonl",
        synthetic.environment("run-1"),
        synthetic.measurements("run-1", ("1x16",), ("hf-sdpa",)),
    )
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "draw", lambda lines: [])
    readme.write_text(block("main"))
    assert report.main([str(mine)]) == 0 and readme.read_text() == block("main")
    monkeypatch.setattr(results, "SUITE", mine)
    monkeypatch.chdir(tmp_path)
    assert report.main(["mine.jsonl"]) == 0 and readme.read_text() == block("main", "Not measured yet.\n")
    page_.unlink()
    readme.write_text(block("mian"))
    assert report.main([str(mine)]) == 2 and page_.exists(), "the rest goes on"
    assert readme.read_text() == block("mian") and "'mian'" in capsys.readouterr().err


# The tables.


def test_the_main_table_says_what_the_lines_say(shown):
    (table,) = tables.main(shown)
    for row in cells(table):
        precision = row["dtype"].text
        (ours,) = (
            line
            for line in shown.where(benchmark="inference", peer="bertfast", precision=precision)
            if words.workload(line) == row["workload"].text
        )
        stock = shown.baseline(ours)
        speedup, unpacked = ours["speedup"], shown.beside(ours, "bertfast-unpacked-weights")
        assert row["Hugging Face"].text == f"{1e3 * stock['median_s']:.1f} ms" and stock["run"] == ours["run"]
        assert row["bertfast"].text == f"{1e3 * ours['median_s']:.1f} ms"
        assert row["speed-up"].text == f"{speedup['value']:.2f}×" and row["speed-up"].strong
        assert row["speed-up"].detail == f"({speedup['low']:.2f}–{speedup['high']:.2f})"
        over = ours["speedup_over_float32"]
        assert row["over float32"].text == words.times(over["value"])
        assert row["over float32"].detail == f"({words.times(over['low'])[:-1]}–{words.times(over['high'])[:-1]})"
        assert row["without packed weights"].text == f"{unpacked['speedup']['value']:.2f}×"
        assert row["error: Hugging Face / bertfast"].value == ours["error"]["max"]
        assert row["memory"].text == f"{100 * ours['peak_bytes'] / stock['peak_bytes']:.0f} %"
        if ours["workload"] == "1x16":
            stated = {"float32": ("2.4×", ""), "bfloat16": ("4×", "over float32")}[precision]
            assert (row["goal"].text, row["goal"].detail) == stated
        else:
            assert row["goal"].text == "–"
    assert [row["workload"].text for row in cells(table)][::2] == [
        "BERT-base, 1 × 16",
        "BERT-base, 8 × 128, no padding",
        "BERT-base, 32 × ≤ 128, 42 % full",
        "BERT-base, rerank 32 pairs, 50 % full",
    ]
    assert "AMD EPYC, 2 threads, PyTorch 2.13.0+cpu" in table.caption and "222222222222, 111111111111" in table.caption


def test_a_goal_of_before_is_over_the_precision_of_its_line():
    (line,) = (x for x in synthetic.measurements("run-1", ("1x16",)) if (x["peer"], x["precision"]) == OURS_HALF)
    del line["goal_over"], line["speedup_over_float32"]
    (row,) = cells(tables.main(Lines({"run-1": synthetic.environment("run-1")}, [line]))[0])
    assert (row["goal"].text, row["goal"].detail) == ("4×", "") and row["over float32"].value is None
    assert "measured before" in row["over float32"].note


def all_precisions(*workloads: str, **changes: dict) -> list[tables.Table]:
    """The tables of what each precision buys; changes: of bertfast's lines in a precision."""
    lines = synthetic.measurements("run-1", workloads)
    ours = [line for line in lines if (line["peer"], line["precision"]) == ("bertfast", "float32")]
    for line in ours:
        ratio = {end: 3 * value for end, value in line["speedup"].items()}
        more = {"precision": "int8", "speedup": ratio, "speedup_over_float32": ratio, "goal": 6.5, "roofline_goal": 0.6}
        lines.append(line | more | {"goal_over": "float32", "error": {"max": 0.2, "mean": 0.1, "cosine": 0.98765}})
    for line in lines:
        if line["peer"] == "bertfast":
            line |= changes.get(line["precision"], {})
    return precisions.side_by_side(Lines({"run-1": synthetic.environment("run-1")}, lines))


def test_what_each_precision_buys_is_over_hugging_face_in_float32():
    speed, errors, shares = all_precisions("1x16", "8x128", "rerank 32 pairs")
    assert speed.columns[:5] == (
        *("workload", "Hugging Face float32", "bertfast float32", "bertfast bfloat16", "bertfast int8"),
    )
    assert speed.columns[5:] == ("OpenVINO float32", "OpenVINO bfloat16", "ONNX Runtime int8")
    assert speed.remarks == ("CTranslate2 float32: ctranslate2 is not installed: pip install 'bertfast[bench]'",)
    assert [row["workload"].text for row in cells(speed)] == ["BERT-base, 1 × 16", "BERT-base, 8 × 128, no padding"]
    row = cells(speed)[0]
    assert row["Hugging Face float32"].value == pytest.approx(0.06, rel=0.02)
    assert row["bertfast bfloat16"].value == pytest.approx(5.0, rel=0.02), "and not 2.5, over bfloat16"
    assert row["OpenVINO bfloat16"].value == pytest.approx(2.4, rel=0.02)
    assert row["ONNX Runtime int8"].value == pytest.approx(3.2, rel=0.02)
    assert row["bertfast int8"].detail == "(goal 6.5×)" and row["bertfast bfloat16"].detail == "(goal 4×)"
    assert row["OpenVINO bfloat16"].detail == "", "goals are bertfast's"
    strong = [column for column in speed.columns if row[column].strong]
    assert strong == ["bertfast float32", "bertfast bfloat16", "bertfast int8"]
    wrong = cells(speed)[1]["ONNX Runtime int8"]
    assert wrong.text == "–" and "inaccurate" in wrong.note
    assert errors.columns == ("workload", "Hugging Face float32", "Hugging Face bfloat16", *speed.columns[2:])
    row = cells(errors)[0]
    assert (row["bertfast int8"].text, row["bertfast int8"].detail) == ("2.0e-01", "(cosine 0.9877)")
    assert (row["bertfast float32"].text, row["bertfast float32"].detail) == ("3.0e-06", "")
    row = cells(shares)[0]
    assert (row["bertfast int8"].text, row["bertfast int8"].detail) == (row["bertfast float32"].text, "(goal 60 %)")
    assert row["bertfast float32"].detail == "" and shares.columns[1:] == tuple(c.title for c in precisions.BERTFAST)


def test_the_page_says_that_int8_is_over_float32():
    lines = [line for line in synthetic.measurements("run-1", ("1x16",)) if line["peer"] == "bertfast"]
    lines += [line | {"precision": "int8"} for line in lines[:1]]
    cards = "".join(page.cards(Lines({"run-1": synthetic.environment("run-1")}, lines)))
    assert cards.count("as fast as Hugging Face,") == 2
    assert cards.count("as fast as Hugging Face in float32,") == 1


def test_the_best_of_each_precision_is_in_bold_whoever_it_is():
    slow = {end: 0.5 for end in ("value", "low", "high")}
    speed, *_ = all_precisions("1x16", int8={"speedup_over_float32": slow})
    (row,) = cells(speed)
    assert row["ONNX Runtime int8"].strong and not row["bertfast int8"].strong and row["bertfast float32"].strong


def test_a_bertfast_that_refuses_to_be_quantised_says_why():
    refused = {"status": "skipped", "reason": "in int8 the model's answers differ"}
    speed, *_ = all_precisions("1x16", int8=refused)
    assert "bertfast int8" not in speed.columns
    assert "bertfast int8: in int8 the model's answers differ" in speed.remarks
    assert precisions.side_by_side(Lines({}, [])) == []


def test_of_each_thing_the_newest_run_is_shown_whatever_the_order(suite):
    environments, measurements = results.read(suite)
    for order in (measurements, measurements[::-1]):
        shown = Lines(environments, order)
        assert {line["run"] for line in shown.where(workload="1x16")} == {"run-2"}
        assert {line["run"] for line in shown.where(workload="32x128 ragged")} == {"run-1"}


def test_hugging_face_is_taken_from_the_run_that_bertfast_was_compared_in():
    """A newer run of Hugging Face alone may have been on a slower day."""
    old = synthetic.measurements("run-1", ("1x16",))
    new = synthetic.measurements("run-2", ("1x16",), ("hf-sdpa",), slower={"hf-sdpa": 3.0})
    shown = Lines({r: synthetic.environment(r) for r in ("run-1", "run-2")}, old + new)
    assert one(shown, peer="hf-sdpa", precision="float32")["run"] == "run-2"
    row = cells(tables.main(shown)[0])[0]
    assert row["Hugging Face"].value / row["bertfast"].value == pytest.approx(row["speed-up"].value)


def test_the_peers_table_says_what_the_lines_say_and_why_there_is_nothing(shown):
    by_precision = {table.title: table for table in tables.peers(shown)}
    assert list(by_precision) == ["CPU, float32", "CPU, bfloat16", "CPU, int8"]
    table = by_precision["CPU, float32"]
    assert table.columns == ("workload", "hf-sdpa", "bertfast", "hf-eager", "openvino")
    for row in cells(table):
        for peer in ("bertfast", "hf-eager", "openvino"):
            (line,) = (
                x for x in shown.where(peer=peer, precision="float32") if words.workload(x) == row["workload"].text
            )
            assert row[peer].text == f"{line['speedup']['value']:.2f}×"
        assert [peer for peer in table.columns if row[peer].strong] == ["bertfast"]
    assert table.remarks == ("ctranslate2: ctranslate2 is not installed: pip install 'bertfast[bench]'",)
    int8 = by_precision["CPU, int8"]
    assert "over Hugging Face with sdpa in float32" in int8.caption
    wrong = cells(int8)[1]["onnxruntime-int8"]
    assert (wrong.text, wrong.value) == ("–", None)
    assert int8.notes == [wrong.note] == ["onnxruntime-int8: inaccurate: the error of 1.2 is above 0.5"]
    text = markdown.one(int8)
    assert "| –<sup>1</sup> |" in text and "\n1. onnxruntime-int8: inaccurate" in text
    assert "8 × 128, no padding" in text, "known from other lines where this one was not measured"


def test_curves_are_for_plots_and_training_has_a_table_of_its_own(shown):
    assert shown.where(workload="length 64")
    text = markdown.render([*tables.main(shown), *tables.peers(shown)])
    assert "length" not in text and "scaling" not in text and "train" not in text
    (table,) = tables.training(shown)
    assert [row["workload"].text for row in cells(table)] == ["BERT-base, train 8 × 128, no padding"] * 2
    eager = one(shown, benchmark="training", peer="hf-eager", precision="float32")
    assert cells(table)[0]["hf-eager"].value == eager["speedup"]["value"]


def test_a_bertfast_that_could_not_run_says_why():
    measured = synthetic.measurements("run-1", ("1x16",))
    for line in measured:
        if line["peer"] == "bertfast" and line["precision"] == "bfloat16":
            line |= {"status": "failed", "reason": "RuntimeError: out of\nmemory | there"}
    shown = Lines({"run-1": synthetic.environment("run-1")}, measured)
    text = markdown.render(tables.main(shown))
    assert "| BERT-base, 1 × 16 | bfloat16 |  | –<sup>1</sup> |" in text
    assert "1. bertfast: failed: RuntimeError: out of memory | there" in text


def test_peers_that_there_was_no_time_for_share_a_reason():
    measured = synthetic.measurements("run-1", ("1x16", "8x128"))
    for line in measured:
        if line["peer"] in ("openvino", "hf-eager") and (line["precision"], line["workload"]) == ("float32", "8x128"):
            line |= {"status": "skipped", "reason": f"6 rounds of {line['peer']} do not fit: {results.OUT_OF_TIME}"}
    (table, *_) = tables.peers(Lines({"run-1": synthetic.environment("run-1")}, measured))
    (row,) = (row for row in cells(table) if row["openvino"].text == "–")
    assert row["openvino"].note == row["hf-eager"].note == "not measured: that run had too little time for everybody"
    assert table.notes.count(row["openvino"].note) == 1


def test_a_line_that_there_was_no_time_for_does_not_take_the_place_of_an_older_one():
    runs = {name: synthetic.environment(name) for name in ("run-1", "run-2")}
    runs["run-1"]["time"], runs["run-2"]["time"] = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    older, newer = (synthetic.measurements(run, ("1x16",)) for run in runs)
    for line, reason in zip(newer, (results.OUT_OF_TIME, "there is no engine"), strict=False):
        line |= {"status": "skipped", "reason": reason}
    shown = Lines(runs, [*older, *newer]).where(workload="1x16")
    assert shown[0] == older[0] and shown[1:] == newer[1:]


def test_what_patching_costs():
    measured = synthetic.measurements("run-1", ("1x16",))[:1]
    line = measured[0] | {"benchmark": "overhead", "peer": "bertfast", "precision": "float32", "status": "measured"}
    line |= {"median_s": 0.02, "overhead_s": 4.2e-5, "overhead": {"value": 0.0021}, "patch_s": 0.0004}
    shown = Lines({"run-1": synthetic.environment("run-1")}, [line | {"peer": "bertfast-native"}, line])
    (table,) = tables.overhead(shown)
    (row,) = cells(table)
    assert (row["more"].text, row["of it"].text, row["`patch`"].text) == ("42 µs", "0.2 %", "0.40 ms")


def test_what_training_keeps():
    line = synthetic.measurements("run-1", ("1x16",))[0] | {"benchmark": "memory", "precision": "float32"}
    line |= {"peer": "bertfast", "status": "measured", "peak_bytes": 5e8, "goal": 0.6}
    lines = [line | {"peer": "hf-sdpa", "peak_bytes": 1e9, "goal": None}, line]
    (table,) = tables.activations(Lines({"run-1": synthetic.environment("run-1")}, lines))
    (row,) = cells(table)
    assert (row["Hugging Face"].text, row["bertfast"].text) == ("1 GB", "500 MB")
    assert (row["of it"].text, row["goal"].text) == ("50 %", "≤ 60 %")


def test_epochs_of_fine_tuning():
    line = synthetic.measurements("run-1", ("1x16",))[0] | {"benchmark": "finetuning", "precision": "float32"}
    line |= {"status": "measured", "baseline": "hf-sdpa", "accuracy": 0.914, "goal": 2.2}
    stock = line | {"peer": "hf-sdpa", "median_s": 9.0, "accuracy": 0.908, "speedup": None, "goal": None}
    ours = line | {"peer": "bertfast", "median_s": 3.0, "speedup": {"value": 3.0, "low": 2.9, "high": 3.1}}
    (table,) = tables.finetuning(Lines({"run-1": synthetic.environment("run-1")}, [stock, ours]))
    (row,) = cells(table)
    assert (row["speed-up"].text, row["speed-up"].detail) == ("3.00×", "(2.90–3.10)")
    assert row["accuracy: Hugging Face / bertfast"].text == "91 % / 91 %"


def test_a_speed_up_over_another_baseline_is_not_shown_as_one_over_hugging_face():
    measured = synthetic.measurements("run-1", ("1x16",))
    for line in measured:
        line["baseline"] = "openvino"
    shown = Lines({"run-1": synthetic.environment("run-1")}, measured)
    assert "bertfast: measured, but not beside hf-sdpa" in markdown.render(tables.main(shown))


def test_noise_is_said():
    measured = synthetic.measurements("run-1", ("1x16",))
    for line in measured:
        if line["status"] == "measured":
            line["noise"] = {"others": 0.31, "steal": 0.02, "noisy": True}
    shown = Lines({"run-1": synthetic.environment("run-1")}, measured)
    assert "1. other processes and the hypervisor took 33 % of the processors' time" in markdown.render(
        tables.main(shown)
    )


def test_a_commit_with_changes_of_its_own_is_told_from_a_clean_one():
    assert words.commit({"commit": "0123456789abcdef"}) == "0123456789ab"
    assert words.commit({"commit": "0123456789abcdef-dirty"}) == "0123456789ab-dirty"
    assert words.commit({"commit": None}) == "unknown"


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (words.duration, 0.0012345, "1.23 ms"),
        (words.duration, 0.0654, "65.4 ms"),
        (words.duration, 12.34, "12.3 s"),
        (words.times, 13.27, "13.3×"),
        (words.count, 12345.6, "12,346"),
        (words.count, 3.14159, "3.14"),
        (words.size, 999.7, "1 kB"),
        (words.size, 3.4e8, "340 MB"),
        (lambda x: words.rate(x, "FLOP"), 2.2e11, "220 GFLOP/s"),
        (lambda x: words.rate(x, "B"), 999.9e9, "1 TB/s"),
    ],
)
def test_numbers_as_people_read_them(show, value, text):
    assert show(value) == text


# The plots.


def test_there_is_a_plot_of_everything_that_was_measured(drawn):
    assert [plot.name for plot in drawn] == [
        *("speedup-cpu-float32", "speedup-cpu-bfloat16", "speedup-cpu-int8"),
        *("throughput-cpu", "latency-cpu", "scaling-cpu", "roofline-cpu"),
    ]


def named(drawn: list, name: str):
    return next(plot.figure for plot in drawn if plot.name == name)


def test_bars_are_the_speed_ups(shown, drawn):
    figure = named(drawn, "speedup-cpu-float32")
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes}
    peers = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(panels) == len(ALL) and peers == ["bertfast", "hf-eager", "openvino"]
    for workload in ALL:
        ax = panels[words.title(shown.where(workload=workload)[0])]
        widths = [one(shown, workload=workload, peer=p, precision="float32")["speedup"]["value"] for p in peers]
        assert [bar.get_width() for bar in ax.patches] == widths


@pytest.mark.parametrize(
    ("name", "series", "value"),
    [
        ("throughput-cpu", "length", lambda line: line["tokens"] / line["median_s"]),
        ("latency-cpu", "batch", lambda line: line["median_s"]),
        ("scaling-cpu", "scaling", lambda line: line["sequences"] / line["median_s"]),
    ],
)
def test_curves_are_the_lines(shown, drawn, name, series, value):
    ax = named(drawn, name).axes[1]
    assert ax.get_title(loc="left") == "BERT-base, bfloat16"
    ours = ax.lines[-1]  # over the others
    measured = {
        int(line["workload"].split()[1]): value(line)
        for line in shown.where(peer="bertfast", precision="bfloat16")
        if line["workload"].startswith(series)
    }
    assert ours.get_xdata().tolist() == sorted(measured)
    assert ours.get_ydata().tolist() == pytest.approx([measured[x] for x in sorted(measured)])


def test_the_roof_is_what_was_measured_of_the_machine(drawn):
    figure = named(drawn, "roofline-cpu")
    for ax, flops in zip(figure.axes, (2.2e11, 4.5e11, 8e11), strict=True):
        *points, roof = ax.lines
        (x0, ridge, _), (y0, *tops) = roof.get_data()
        assert tops == [flops, flops] and ridge == pytest.approx(flops / 3.3e10) and y0 == pytest.approx(x0 * 3.3e10)
        assert all((line.get_ydata() < flops).all() for line in points)


def test_plots_without_lines_are_left_out_and_said(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = synthetic.write(
        tmp_path / "mine.jsonl",
        synthetic.environment("run-1", ceilings={}),
        synthetic.measurements("run-1", ("1x16", "length 16")),
    )
    assert report.main([str(path)]) == 0
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {
        f"speedup-cpu-{precision}.{kind}" for precision in ("float32", "bfloat16", "int8") for kind in ("svg", "png")
    }
    assert "no lines have what they show: throughput, latency, scaling, roofline\n" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_plots_are_the_same_files_from_the_same_lines(shown, drawn):
    from benchmarks.report import plots

    for first, second in zip(drawn[2::3], plots.draw(shown)[2::3], strict=True):
        assert first.svg() == second.svg() and first.png() == second.png()
        assert "<dc:date>" not in first.svg() and "matplotlib.org" not in first.svg()


def test_without_matplotlib_the_tables_go_on(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    html = tmp_path / "page.html"
    assert report.main([str(suite), "--html", str(html), "--plots", str(tmp_path / "plots")]) == 0
    assert "pip install 'bertfast[plots]'" in capsys.readouterr().err
    assert "<table" in html.read_text() and "<svg" not in html.read_text() and not (tmp_path / "plots").exists()


# The page.


class Elements(html.parser.HTMLParser):
    """Checks that every element is closed where it should be, and collects ids, addresses and cells."""

    VOID = ("meta", "input", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self._table = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [str(v) for k, v in attributes if k in ("href", "src", "xlink:href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = str(given["id"])
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            self.rows[self._table][-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open[-3:]):
            self.rows[self._table][-1][-1] += data


@pytest.fixture(scope="module")
def written(shown, drawn) -> str:
    return page.render(shown, drawn)


def test_the_page_is_whole_and_needs_no_network(written, drawn):
    found = Elements(written)
    assert not found.open and len(found.ids) == len(set(found.ids))
    assert found.addresses and all(address[1:] in found.ids for address in found.addresses if address[0] == "#")
    assert all(address.startswith("#") for address in found.addresses)
    assert re.findall(r"url\((?!#)", written) == []
    assert written.count("<svg") == len(drawn) and written.count("<style") == 1, "a plot's style would be the page's"


def test_the_page_shows_the_tables_and_every_line(shown, written):
    found = Elements(written)
    (main,), every = tables.main(shown), found.rows["everything"]
    assert [row[3] for row in found.rows["main-0"]] == ["bertfast", *(row["bertfast"].text for row in cells(main))]
    assert len(every) == 1 + len(shown.where(status="measured"))
    assert "energy" not in every[0] and "of the roofline" in every[0], "columns without any value are left out"


def test_nothing_but_refusals_is_a_page_without_tables_of_numbers():
    skipped = synthetic.measurements("run-1", ("1x16",), ("ctranslate2",))
    found = Elements(page.render(Lines({"run-1": synthetic.environment("run-1")}, skipped), []))
    assert not found.rows and "where-it-was-measured" in found.ids


def test_what_is_written_in_results_is_text_on_the_page():
    measured = synthetic.measurements("run-1", ("1x16",))
    for line in measured:
        if line["status"] == "skipped":
            line |= {"reason": "<script>alert('&')</script>"}
    text = page.render(Lines({"run-1": synthetic.environment("run-1", cpu='"<b>')}, measured), [])
    assert (
        "<script>alert" not in text and "&lt;script&gt;alert(&#x27;&amp;&#x27;)" in text and "&quot;&lt;b&gt;" in text
    )


@pytest.fixture(scope="module")
def browser(written, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH to show the page")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(written)
    with Browser(folder / "profile") as browser:
        browser.look()
        browser.open(folder / "report.html")
        yield browser


def test_a_browser_shows_tables_and_plots_without_complaint(browser, drawn):
    for what, number in (("table", 9), ("figure svg", len(drawn))):
        sizes = browser.run(
            f"[...document.querySelectorAll('{what}')].map(e => [e.clientWidth, e.getBoundingClientRect().height])"
        )
        assert len(sizes) == number and all(width > 300 and height > 50 for width, height in sizes)
    assert browser.run("document.querySelector('figure svg text').getBoundingClientRect().width") > 10
    assert browser.errors == []


def column(browser: Browser, table: str, number: int) -> list[str]:
    return browser.run(f"[...document.getElementById('{table}').tBodies[0].rows].map(r => r.cells[{number}].innerText)")


def test_a_click_sorts(browser):
    before = column(browser, "main-0", 3)
    milliseconds = sorted(before, key=lambda text: float(text.split()[0]))
    assert before != milliseconds
    browser.click("#main-0 th button", 3)
    assert column(browser, "main-0", 3) == milliseconds
    browser.click("#main-0 th button", 3)
    assert column(browser, "main-0", 3) == milliseconds[::-1]
    browser.click("#main-0 th button", 1)
    assert column(browser, "main-0", 1) == ["bfloat16"] * 4 + ["float32"] * 4
    states = browser.run("[...document.querySelectorAll('#main-0 th[aria-sort]')].map(e => e.ariaSort)")
    assert states == ["none", "ascending", *["none"] * 8]


def test_what_has_no_value_stays_at_the_end_either_way(browser):
    found = []
    for _ in range(2):
        browser.click("#peers-2 th button", 2)
        found.append(column(browser, "peers-2", 2))
    assert found[0][:-1] == found[1][:-1][::-1] and all(texts[-1].startswith("–") for texts in found)


def test_rows_can_be_looked_for(browser):
    shown = "[...document.querySelectorAll('#everything tbody tr')].filter(r => r.checkVisibility()).length"
    every = browser.run(shown)
    browser.click("input")
    browser.ask("Input.insertText", text="openvino BFLOAT16 scaling")
    assert browser.run(shown) == 3 < every
    browser.run(
        "(() => { const i = document.querySelector('input'); i.value = ''; i.dispatchEvent(new Event('input')) })()"
    )
    assert browser.run(shown) == every


def test_dark_and_narrow(browser):
    colours = "['body', 'figure svg text', 'td b'].map(s => getComputedStyle(document.querySelector(s)))"
    colours = f"(() => {{ const [a, b, c] = {colours}; return [a.backgroundColor, b.fill, c.color] }})()"
    light = browser.run(colours)
    browser.look(dark=True, width=390)
    dark = browser.run(colours)
    assert all(a != b for a, b in zip(light, dark, strict=True)) and dark[0] == "rgb(18, 22, 27)"
    assert browser.run("document.documentElement.scrollWidth") <= 390, "tables and plots scroll by themselves"
    browser.look()


# The comparison.


def compared(tmp_path: Path, capsys, after: list[dict], environment: dict | None = None) -> tuple[int, str]:
    """Exit status and output of a comparison of run-1 with these measurements of run-2."""
    old = synthetic.write(tmp_path / "a.jsonl", synthetic.environment("run-1"), synthetic.measurements("run-1", ALL))
    new = synthetic.write(tmp_path / "b.jsonl", environment or synthetic.environment("run-2"), after)
    status = report.main(["--compare", str(old), str(new)])
    return status, capsys.readouterr().out


def test_the_same_code_measured_again_is_unchanged(tmp_path, capsys):
    status, text = compared(tmp_path, capsys, synthetic.measurements("run-2", ALL, seed=5))
    assert status == 0 and f"unchanged: {10 * len(ALL) + 3}\n" in text
    assert "regressions" not in text and "improvements" not in text and "NOT THE SAME" not in text


def test_a_regression_is_found_and_fails(tmp_path, capsys):
    after = synthetic.measurements("run-2", ALL, slower={"bertfast": 1.05, "openvino": 0.9}, seed=5)
    status, text = compared(tmp_path, capsys, after)
    assert status == 1 and "regressions: 8\n" in text and "improvements: 8\n" in text
    (row,) = re.findall(r"BERT-base, 1 × 16: bertfast, float32, cpu +(.*)", text)
    before, _, after_, _, ratio, low, _, high = row.split()
    assert 1.03 < float(low) < float(ratio) < float(high) < 1.07
    assert float(ratio) == pytest.approx(float(after_) / float(before), rel=0.01)


@pytest.mark.parametrize("slower", [1.015, 1 / 1.015])
def test_a_change_that_is_sure_but_small_is_none(tmp_path, capsys, slower):
    after = synthetic.measurements("run-2", ALL, slower={"bertfast": slower}, rounds=2000)
    old = synthetic.measurements("run-1", ALL, rounds=2000)
    found = [c for c in comparison.changes(Lines({}, old), Lines({}, after)) if c.line["peer"] == "bertfast"]
    assert all(change.verdict == "unchanged" and not change.ratio.low <= 1 <= change.ratio.high for change in found)


def test_a_change_that_is_large_but_unsure_is_none():
    draw = np.random.default_rng(3)
    a = synthetic.measurements("run-1", ("1x16",), ("bertfast",))
    b = copy.deepcopy(a)
    for line in a + b:
        line["seconds"] = draw.lognormal(0, 0.5, 6).tolist()
    b[0]["seconds"] = [1.1 * s for s in a[0]["seconds"]]
    change = comparison.changes(Lines({}, a), Lines({}, b))[0]
    assert change.ratio.value == pytest.approx(1.1) and change.verdict == "unchanged"


def test_what_is_missing_is_said_and_what_broke_fails(tmp_path, capsys):
    after = [line for line in synthetic.measurements("run-2", ALL) if line["peer"] != "hf-eager"]
    status, text = compared(tmp_path, capsys, after)
    assert status == 0 and "missing in B: 8\n" in text
    assert "BERT-base, 1 × 16: hf-eager (float32, bfloat16): not run\n" in text
    for line in after:
        if line["peer"] == "bertfast" and line["precision"] == "float32":
            line |= {"status": "inaccurate", "reason": "the largest error is 3"}
    status, text = compared(tmp_path, capsys, after)
    assert status == 1 and "no longer measured: 4\n" in text
    assert "BERT-base, 1 × 16: bertfast (float32): inaccurate: the largest error is 3\n" in text


def test_another_machine_is_said_in_one_line(tmp_path, capsys):
    environment = synthetic.environment("run-2", threads=4)
    environment["versions"] = environment["versions"] | {"torch": "2.14.0"}
    after = synthetic.measurements("run-2", ALL, slower=dict.fromkeys(synthetic.PEERS, 1.2))
    _, text = compared(tmp_path, capsys, after, environment)
    (line,) = re.findall("NOT THE SAME ENV.*", text)
    assert "AMD EPYC, 2 threads, then AMD EPYC, 4 threads" in line and "torch 2.13.0+cpu, then 2.14.0" in line
    assert "NOT THE SAME SPEED: hf-sdpa itself took 1.2" in text


def test_runs_of_one_file_can_be_compared(suite, capsys):
    assert report.main(["--compare", f"{suite}@run-1", f"{suite}@run-2"]) == 0
    text = capsys.readouterr().out
    assert "A: run run-1 of 2026-12-01T10:00:00Z, commit 111111111111\n" in text and "unchanged: 21\n" in text


@pytest.mark.parametrize("n", [1, 2, 5, 6, 41])
def test_medians_of_resamples_are_those_that_resampling_gives(n):
    draw = np.random.default_rng(7)
    values = draw.lognormal(0, 0.3, n)
    quick = comparison._medians(values, draw)
    slow = np.median(values[draw.integers(n, size=(10_000, n))], axis=1)
    assert np.isclose(quick.mean(), slow.mean(), rtol=0.01)
    for quantile in (0.025, 0.25, 0.5, 0.75, 0.975):
        # The share of either that is below the other's quantile; the values are few, so there are ties.
        at = np.quantile(slow, quantile)
        assert (quick < at * (1 - 1e-9)).mean() - 0.02 <= quantile <= (quick <= at * (1 + 1e-9)).mean() + 0.02


def test_an_interval_holds_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(11)
    held = 0
    for _ in range(300):
        ratio = comparison.unpaired(1.3 * draw.lognormal(0, 0.1, 25), draw.lognormal(0, 0.1, 25))
        held += ratio.low <= 1.3 <= ratio.high
    assert 0.9 <= held / 300 <= 0.995


# Bad input.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no measurements in it: run python -m benchmarks"),
        ('{"benchmark": "encoder", "workload": "1x16"}\n', "not of schema 2"),
        ("{broken\n", "no JSON objects"),
        ('{"schema": 2, "record": "measurement", "run": "r"}\n', "passed over 1 measurements"),
        ('{"schema": 2}\n', "python -m benchmarks did not write that"),
    ],
)
def test_a_file_without_results_is_bad_input(tmp_path, capsys, text, message):
    path = tmp_path / "some.jsonl"
    path.write_text(text)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == [path]


def test_lines_that_cannot_be_read_do_not_stop_the_rest(suite, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text("{broken\n" + json.dumps({"schema": 1}) + "\n" + suite.read_text())
    assert len(report.read(path).where()) == len(report.read(suite).where())
    assert "(1), no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "{suite}@run-9", "{suite}"], "no run 'run-9': choose from run-1, run-2"),
        (["--compare", "nowhere.jsonl", "{suite}"], "nowhere.jsonl: No such file or directory"),
        (["nowhere.jsonl", "--check"], "nowhere.jsonl: No such file or directory"),
        (["{other}", "--html", "/nowhere/at/all.html", "--plots", "{suite}"], "no page: "),
        (["--compare", "{suite}@run-2", "{other}"], "nothing was measured both in "),
    ],
)
def test_bad_input_is_one_line(suite, tmp_path, capsys, arguments, message):
    other = synthetic.write(
        tmp_path / "other.jsonl", synthetic.environment("run-1"), synthetic.measurements("run-1", ("batch 1",))
    )
    assert report.main([a.format(suite=suite, other=other) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and all(line.startswith("python -m benchmarks.report: ") for line in error.splitlines())


def test_a_reader_who_has_seen_enough_is_no_error(suite):
    command = [sys.executable, "-m", "benchmarks.report", "--compare", f"{suite}@run-1", f"{suite}@run-2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=report.README.parent) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_an_unknown_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--bogus"])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_every_key_is_of_one_line(shown):
    assert len({lines.key(line) for line in shown.where()}) == len(shown.where())
