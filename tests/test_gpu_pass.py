"""`python -m benchmarks.gpu` as far as it goes without a GPU: the whole pass, its deadlines, and what ends badly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from benchmarks.gpu import report
from benchmarks.gpu.plan import PHASES
from benchmarks.gpu.results import Results

ROOT = Path(__file__).parent.parent


def start(output, *more, modules=None, **how):
    """The pass on the CPU, as a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--output", str(output), *more]
    path = os.pathsep.join(str(p) for p in (ROOT, modules) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # threads that wait cost more
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how
    )


def run(*arguments, limit=120, **how):
    process = start(*arguments, **how)
    out, _ = process.communicate(timeout=limit)
    assert process.returncode == 0, out
    return out


def statuses(output, phase):
    return {r["key"]: r["status"] for r in Results(output / "results.jsonl").read(phase) if "key" in r}


def words(output, phase):
    found = [r["status"] for r in Results(output / "results.jsonl").read(phase) if "key" not in r]
    return [status for status in found if status != "begun"]


def test_a_whole_pass_that_is_killed_in_the_middle_and_taken_up_again(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    process = start(tmp_path, "--budget", "200")
    deadline = time.monotonic() + 120
    while "bias_gelu 37x96 float32 forward + backward" not in statuses(tmp_path, "ops"):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(0.5)
    before = results.read()
    assert not results.complete("ops") and results.complete("ceilings")
    time.sleep(1)
    assert results.read() == before  # nobody goes on writing

    table = run(tmp_path, "--budget", "200")
    after = results.read()
    assert after[: len(before)] == before
    for phase in PHASES:
        assert results.complete(phase), (phase, (tmp_path / "log.txt").read_text()[-2000:])
        assert set(statuses(tmp_path, phase).values()) == {"done"}, statuses(tmp_path, phase)
    done = [(r["phase"], r["key"]) for r in after if r["status"] == "done"]
    assert len(done) == len(set(done))  # nothing twice
    assert {r["device"] for r in after if r["status"] == "done"} == {"cpu"}
    check_records(results)
    assert len(table) <= report.MOST + 200 and "attention dropout ragged" in table and "tiny b3 s9" in table
    assert (tmp_path / "report.txt").read_text().strip() in table

    again = len(results.read())
    begin = time.monotonic()
    assert "complete" in run(tmp_path) and time.monotonic() - begin < 20
    assert len(results.read()) == again


def check_records(results):
    for record in results.read("ops"):
        if record["status"] != "done":
            continue
        assert record["best"] in ("cpu", "reference") and record["accuracy"][record["best"]]["accurate"]
        assert record["times"][record["best"]]["microseconds"] > 0 and record["times"][record["best"]]["rounds"] >= 5
        assert record["bytes"] > 0 and record["goals"] == []  # goals are a GPU's
    (environment,) = (r["environment"] for r in results.read("environment") if r["status"] == "done")
    assert environment["versions"]["torch"] and environment["gpus"] == []
    for record in results.read("encoder"):
        assert record["status"] != "done" or record["accuracy"]["accurate"]
    assert [r["outcome"] for r in results.read("parity") if r["status"] == "done"]


MODULES = {
    "sleeper": "import time\ndef items(context):\n    time.sleep(1000)\n    yield\n",
    "items_of_all_kinds": """
import os, time
from benchmarks.gpu.plan import Item
def fails():
    raise ValueError("wrong on purpose")
def items(context):
    yield Item("first", lambda: {"value": 1})
    yield Item("raises", fails)
    yield Item("dies", lambda: os._exit(11))
    yield Item("hangs", lambda: time.sleep(1000))
    yield Item("last", lambda: {"value": 2})
""",
    "dies_at_once": "import os\nos._exit(3)\n",
    "endless": """
import time
from benchmarks.gpu.plan import Item
def items(context):
    for i in range(1000):
        yield Item(str(i), lambda: time.sleep(0.2) or {}, least=0.5)
""",
}


@pytest.fixture
def folders(tmp_path):
    """An empty output folder, and one with modules that are phases of their own: gpu_pass.sleeper and others."""
    package = tmp_path / "modules" / "gpu_pass"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, code in MODULES.items():
        (package / f"{name}.py").write_text(code)
    return tmp_path / "output", tmp_path / "modules"


@pytest.mark.parametrize(("more", "ended"), [(["--stall", "3"], "hung"), ([], "cut")])
def test_a_phase_that_sleeps_forever_is_ended_and_the_pass_goes_on(folders, more, ended):
    output, modules = folders
    begin = time.monotonic()
    run(output, "--phases", "gpu_pass.sleeper,environment", "--budget", "28", *more, modules=modules)
    assert time.monotonic() - begin < 35
    assert words(output, "gpu_pass.sleeper") == [ended] and words(output, "environment") == ["complete"]


def test_what_raises_dies_and_hangs_is_recorded_and_passed_over(folders):
    output, modules = folders
    phase = "gpu_pass.items_of_all_kinds"
    ended = {"first": "done", "raises": "failed", "dies": "crashed", "hangs": "hung", "last": "done"}
    table = run(output, "--phases", phase, "--stall", "3", "--budget", "60", modules=modules)
    assert statuses(output, phase) == ended and words(output, phase) == ["complete"]
    assert "wrong on purpose" in table and "exit code 11" in table and "dies: crashed" in table
    count = len(Results(output / "results.jsonl").read())
    run(output, "--phases", phase, "--stall", "3", modules=modules)
    assert len(Results(output / "results.jsonl").read()) == count
    run(output, "--phases", phase, "--stall", "3", "--retry", "--budget", "60", modules=modules)
    keys = [r["key"] for r in Results(output / "results.jsonl").read()[count:] if r["status"] == "started"]
    assert sorted(set(keys)) == ["dies", "hangs", "raises"] and statuses(output, phase) == ended
    run(output, "--phases", phase, "--stall", "3", "--fresh", "--budget", "60", modules=modules)
    assert len(Results(output / "results.jsonl").read()) == count


def test_a_phase_that_cannot_begin_is_recorded(folders):
    output, modules = folders
    run(output, "--phases", "gpu_pass.dies_at_once,gpu_pass.endless", "--budget", "18", modules=modules)
    assert words(output, "gpu_pass.dies_at_once") == ["crashed"]
    assert words(output, "gpu_pass.endless") == ["cut"]
    items = statuses(output, "gpu_pass.endless")
    assert len(items) > 5 and set(list(items.values())[:-1]) == {"done"}
    run(output, "--phases", "gpu_pass.endless", "--budget", "20", modules=modules)
    more = statuses(output, "gpu_pass.endless")
    assert len(more) > len(items)
    done = [r["key"] for r in Results(output / "results.jsonl").read("gpu_pass.endless") if r["status"] == "done"]
    assert len(done) == len(set(done))


def test_ending_the_pass_ends_its_phase(folders):
    output, modules = folders
    process = start(output, "--phases", "gpu_pass.endless", "--budget", "60", modules=modules)
    deadline = time.monotonic() + 60
    while len(statuses(output, "gpu_pass.endless")) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    count = len(Results(output / "results.jsonl").read())
    time.sleep(1)
    assert len(Results(output / "results.jsonl").read()) == count


def test_a_line_that_was_torn_spoils_no_other(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.append(phase="p", key="a", status="done")
    with results.path.open("a") as file:
        file.write('{"phase": "p", "key": "b", "sta')
    results.append(phase="p", key="c", status="done")
    assert [r["key"] for r in results.read("p")] == ["a", "c"] and results.ended("p") == {"a", "c"}
    assert len([json.loads(line) for line in results.path.read_text().splitlines() if line.endswith("}")]) == 2


def op(rows, cuda, triton, **more):
    """A record of a GEMM with both backends' times."""
    times = {
        n: {"microseconds": t, "tflops": 1.0, "gb_per_second": 1.0, "how": "graph"}
        for n, t in (("cuda", cuda), ("triton", triton))
    }
    accuracy = {n: {"accurate": True, "error": 0.0, "plain_error": 0.0} for n in times}
    record = {
        "phase": "ops",
        "key": f"linear gelu {rows}",
        "status": "done",
        "device": "NVIDIA H200",
        "op": "linear gelu",
        "shape": f"{rows}x3072x768",
    }
    record |= {"times": times, "accuracy": accuracy, "best": min(times, key=lambda n: times[n]["microseconds"])}
    return {**record, "flops": 1.0, "cold": True, "best_peer": None, "ratio": None, "goals": [], **more}


def test_the_report_says_what_to_choose():
    table = report.render([op(128, 1, 2), op(4096, 100, 80), op(16384, 400, 300), op(65536, 1600, 1300)])
    assert 'TRITON_FROM[MAJOR, "gelu", 3072, 768] = 4096' in table
    assert "TRITON_FROM[" not in report.render([op(4096, 100, 80), op(16384, 300, 300)])


def test_the_report_shows_goals_and_stays_short():
    goal = {"what": "share", "target": 0.8, "value": 0.7, "met": False}
    records = [op(i, 1, 2, key=f"case {i}", goals=[goal]) for i in range(2000)]
    table = report.render(records)
    assert len(table) <= report.MOST and "MISSED 0.70 of 0.8" in table and "2000 missed" in table
