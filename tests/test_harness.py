"""The harness on made-up peers: what is right is timed, what is not is recorded with its reason, and all goes on."""

import json
import math
import time

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import __main__ as command
from benchmarks import accuracy, calibration, ceilings, goals, harness, models, results, roofline, training
from benchmarks.contenders import Contenders, Ready, Refused
from benchmarks.gpu import timing
from benchmarks.harness import Case, Harness, fitting
from benchmarks.peers import PEERS, Peer, Unavailable
from benchmarks.workloads import Workload, find_workload
from bertfast import native
from bertfast.measure import Summary

RAGGED = Workload("some", (9, 3, 7, 1), batch_size=2)
CEILINGS = {"copy": 1e10, "float32": 1e11, "bfloat16": 2e11}


@pytest.fixture(scope="module")
def stock():
    return models.build("tiny")


def peer(name, prepare, precisions=("float32",), devices=("cpu",), trainable=None):
    return Peer(name, precisions, devices, prepare, trainable)


def honest(setting):
    """The stock model itself, in the precision asked for."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}[setting.precision]
    model = models.build("tiny", setting.head).to(dtype)

    @torch.inference_mode()
    def run(batch):
        out = model(**batch)
        return out.logits if setting.head else out.last_hidden_state

    return run


def changed(change):
    """A peer whose outputs went through change(output, batch)."""

    def prepare(setting):
        run = honest(setting)
        return lambda batch: change(run(batch).clone(), batch)

    return prepare


def broken(*_):
    raise RuntimeError("not in\nthe mood")


def unavailable(_):
    raise Unavailable("some-engine is not installed")


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    """The least number of rounds is enough."""
    monkeypatch.setattr(harness, "PRECISION", 1e9)


@pytest.fixture(autouse=True)
def threads():
    """The command sets PyTorch's, and the next test has them back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measure(tmp_path, cases, precisions=("float32",), seconds=60.0, baseline="hf-sdpa"):
    """All records of a run, without the environment."""
    writer, said = results.Writer(tmp_path / "out.jsonl"), []
    options = {"device": "cpu", "threads": 1, "baseline": baseline, "seconds": seconds, "ceilings": CEILINGS}
    Harness(writer, precisions, say=said.append, **options).run(cases)
    return results.records(writer.path), said


def by_peer(records):
    return {(r["peer"], r["precision"]): r for r in records if r["record"] == "measurement"}


# ---- a run


def test_what_is_right_is_timed_and_all_else_has_its_reason(tmp_path):
    def shifted(output, batch):
        return output + 2e-3

    def nothing_is_a_number(output, batch):
        return output * float("nan")

    def hidden_in_padding(output, batch):
        return output.masked_fill(~batch["attention_mask"].bool()[..., None], 1e9)

    def dies(setting):
        return broken

    peers = [
        peer("hf-sdpa", honest),
        peer("padded", changed(hidden_in_padding)),
        peer("shifted", changed(shifted)),
        peer("nan", changed(nothing_is_a_number)),
        peer("absent", unavailable),
        peer("moody", broken),
        peer("dies", dies),
        peer("gpu", honest, devices=("cuda",)),
        peer("half", honest, precisions=("float16",)),
    ]
    records, said = measure(tmp_path, [Case(RAGGED, "tiny", peers)])
    found = by_peer(records)
    status = {name: r["status"] for (name, _), r in found.items()}
    assert status == {
        "hf-sdpa": "measured",
        "padded": "measured",
        "shifted": "inaccurate",
        "nan": "inaccurate",
        "absent": "skipped",
        "moody": "failed",
        "dies": "failed",
        "gpu": "skipped",
    }
    reasons = {name: r["reason"] for (name, _), r in found.items()}
    assert reasons["hf-sdpa"] == "" and reasons["absent"] == "some-engine is not installed"
    assert reasons["moody"] == reasons["dies"] == "RuntimeError: not in the mood"
    assert reasons["gpu"] == "runs on cuda only" and "largest error is 0.002, more than 0.0001" in reasons["shifted"]
    assert found["nan", "float32"]["error"] == {"max": None, "mean": None, "cosine": -1.0}
    assert len(said) >= len(found) and any("not in the mood" in line for line in said)
    for name in ("shifted", "absent", "moody"):
        assert "seconds" not in found[name, "float32"]


def test_the_record_of_a_measurement(tmp_path):
    records, _ = measure(tmp_path, [Case(RAGGED, "tiny", [peer("hf-sdpa", honest), peer("other", honest)])])
    record = by_peer(records)["other", "float32"]
    assert {record[k] for k in ("benchmark", "workload", "model", "head", "device")} == {
        *("inference", "some", "tiny", "", "cpu")
    }
    assert (record["schema"], record["sequences"], record["tokens"], record["padded"]) == (2, 4, 20, 18 + 14)
    summary = Summary.of(record["seconds"])
    assert record["median_s"] == pytest.approx(summary.median, rel=1e-5) and len(record["seconds"]) >= 6
    assert record["low_s"] <= record["median_s"] <= record["high_s"] and record["p90_s"] <= record["p99_s"]
    assert record["tokens_per_s"] == pytest.approx(20 / record["median_s"])
    assert record["sequences_per_s"] == pytest.approx(4 / record["median_s"])
    assert record["error"]["max"] < 1e-5 < record["error_limit"] and record["error"]["cosine"] > 0.999999
    assert record["prepare_s"] > 0 and record["first_call_s"] > 0 and record["peak_bytes"] > 4 * 18 * 64
    assert record["device_s"] is record["joules"] is record["goal"] is None
    assert set(record["noise"]) == {"others", "steal", "noisy"} and isinstance(record["converged"], bool)
    steps = roofline.forward(models.build("tiny").config, RAGGED.lengths, "float32")
    assert record["flops"] == sum(s.flops for s in steps) and record["bytes"] == sum(s.nbytes for s in steps)
    floor = roofline.floor(steps, CEILINGS, "float32")
    assert record["roofline_share"] == pytest.approx(floor / record["median_s"])
    assert record["baseline"] == "hf-sdpa" and record["speedup"]["low"] <= record["speedup"]["high"]
    cost = records[-1]
    assert cost["record"] == "harness" and 0 < cost["overhead_s"] < 1e-4
    assert cost["share"] == pytest.approx(cost["overhead_s"] / cost["shortest_s"])


def test_speed_is_against_the_baseline_in_the_same_precision_and_in_float32(tmp_path, monkeypatch):
    monkeypatch.setitem(goals.GOALS, ("some", "tiny", "bfloat16"), goals.Goal(1.7, "float32"))
    monkeypatch.setitem(goals.ROOFLINE, ("some", "tiny", "float32"), 0.85)
    half = ("float32", "bfloat16")
    peers = [peer("hf-sdpa", honest, half), peer("bertfast", honest, half), peer("engine", honest, ("int8",))]
    records, _ = measure(tmp_path, [Case(RAGGED, "tiny", peers)], (*half, "int8"))
    found = by_peer(records)
    median = {key: Summary.of(r["seconds"]).median for key, r in found.items()}
    for key, of in (
        (("bertfast", "bfloat16"), ("hf-sdpa", "bfloat16")),
        (("bertfast", "float32"), ("hf-sdpa", "float32")),
        (("engine", "int8"), ("hf-sdpa", "float32")),
    ):
        assert found[key]["speedup"]["value"] == pytest.approx(median[of] / median[key], rel=1e-4)
        assert found[key]["baseline_precision"] == of[1]
        over = found[key]["speedup_over_float32"]
        assert over["value"] == pytest.approx(median["hf-sdpa", "float32"] / median[key], rel=1e-4)
        assert over["low"] <= over["value"] <= over["high"]
    assert found["engine", "int8"]["error_limit"] is None and found["engine", "int8"]["cosine_limit"] == 0.95
    assert found["engine", "int8"]["roofline_share"] is None, "no ceiling was measured for int8"
    stated = {key: (r["goal"], r["goal_over"]) for key, r in found.items() if r["goal"]}
    assert stated == {("bertfast", "bfloat16"): (1.7, "float32")}
    assert {key: r["roofline_goal"] for key, r in found.items() if r["roofline_goal"]} == {
        ("bertfast", "float32"): 0.85
    }
    records, _ = measure(tmp_path / "alone", [Case(RAGGED, "tiny", peers[1:])])
    alone = by_peer(records)["bertfast", "float32"]
    assert alone["speedup"] is alone["speedup_over_float32"] is None


def test_the_needed_peers_come_first_and_what_calibrates_comes_last(tmp_path):
    asked = []

    def noted(name):
        return lambda setting: asked.append((name, setting.precision)) or honest(setting)

    every = ("float32", "bfloat16", "int8")
    names = {"hf-sdpa": every[:2], "engine": every, "bertfast": every, "other": every[:1]}
    peers = [peer(name, noted(name), precisions) for name, precisions in names.items()]
    measure(tmp_path, [Case(RAGGED, "tiny", peers)], every)
    assert asked[:5] == [(name, p) for name in ("hf-sdpa", "bertfast") for p in names[name]]
    assert asked[5:] == [("engine", "float32"), ("other", "float32"), ("engine", "bfloat16"), ("engine", "int8")]


@pytest.mark.parametrize("name", ["rerank 32 pairs", "ner 32 sentences"])
def test_heads_give_logits(tmp_path, name):
    records, _ = measure(tmp_path, [Case(find_workload(name), "tiny", [peer("hf-sdpa", honest)])])
    record = by_peer(records)["hf-sdpa", "float32"]
    assert record["status"] == "measured" and record["head"] in ("sequence", "token")


def test_one_case_that_cannot_be_leaves_the_others_alone(tmp_path):
    cases = [
        Case(Workload("too long", (1000,)), "tiny", [peer("hf-sdpa", honest)]),
        Case(RAGGED, str(tmp_path / "no model"), [peer("hf-sdpa", honest)]),
        Case(RAGGED, "tiny", [peer("hf-sdpa", honest)]),
    ]
    (long, nowhere, fine, _), _ = measure(tmp_path, cases)
    assert long["status"] == "skipped" and "takes 512 tokens a sequence at most, and this has 1000" in long["reason"]
    assert nowhere["status"] == "failed" and "unknown model" in nowhere["reason"]
    assert fine["status"] == "measured"


def test_when_the_time_is_over_nothing_more_is_begun(tmp_path):
    (record, cost), _ = measure(tmp_path, [Case(RAGGED, "tiny", [peer("hf-sdpa", honest)])], seconds=1e-9)
    assert record["status"] == "skipped" and "time was over" in record["reason"]
    assert cost["record"] == "harness" and cost["share"] is None


def test_slow_peers_that_do_not_fit_are_left_out_and_the_needed_ones_never(tmp_path):
    costs = {("slow", "float32"): 3.0, ("hf-sdpa", "float32"): 4.0, ("b", "int8"): 0.5, ("c", "int8"): 0.4}
    assert fitting(costs, 1e9, ["hf-sdpa"]) == list(costs)
    assert fitting(costs, 30.0, ["hf-sdpa"]) == [("hf-sdpa", "float32"), ("b", "int8"), ("c", "int8")]
    assert fitting(costs, 27.0, ["hf-sdpa"]) == [("hf-sdpa", "float32"), ("c", "int8")]
    assert fitting(costs, 0.0, ["hf-sdpa"]) == [("hf-sdpa", "float32")]
    assert fitting(costs, 5.5, ["c"]) == [("b", "int8"), ("c", "int8")], "nobody counts twice"

    def slow(output, batch):
        time.sleep(0.3)
        return output

    peers = [peer("hf-sdpa", honest), peer("slow", changed(slow))]
    begin = time.monotonic()
    records, _ = measure(tmp_path, [Case(RAGGED, "tiny", peers)], seconds=3.0)
    found = by_peer(records)
    assert "6 rounds of 0.6" in found["slow", "float32"]["reason"] and found["slow", "float32"]["status"] == "skipped"
    assert found["hf-sdpa", "float32"]["status"] == "measured" and time.monotonic() - begin < 8


def test_training_steps(tmp_path):
    def trainable(setting):
        return models.build("tiny", "pretraining").train()

    def wrong(setting):
        model = models.build("tiny", "pretraining").train()
        model.bert.encoder.layer[0].attention.self.scaling *= 3
        return model

    both = ("float32", "bfloat16")
    peers = [
        peer("hf-sdpa", honest, both, trainable=trainable),
        peer("bertfast", honest, both, trainable=PEERS["bertfast"].trainable),
        peer("wrong", honest, trainable=wrong),
        peer("inference only", honest),
        peer("absent", honest, trainable=unavailable),
    ]
    workload = Workload("pretrain some", (9, 4, 1), training=True)
    records, _ = measure(tmp_path, [Case(workload, "tiny", peers)], (*both, "int8"))
    found = by_peer(records)
    assert {key: r["status"] for key, r in found.items()} == {
        ("hf-sdpa", "float32"): "measured",
        ("hf-sdpa", "bfloat16"): "measured",
        ("bertfast", "float32"): "measured",
        ("bertfast", "bfloat16"): "measured",
        ("wrong", "float32"): "inaccurate",
        ("absent", "float32"): "skipped",
    }, {key: r["reason"] for key, r in found.items()}
    record = found["bertfast", "float32"]
    assert record["benchmark"] == "training" and record["speedup"]["value"] > 0 and record["peak_bytes"] > 0
    assert record["error"]["max"] < 1e-5 and record["error"]["cosine"] > 0.999999
    forward = sum(s.flops for s in roofline.forward(models.build("tiny").config, workload.lengths, "float32"))
    assert record["flops"] > 3 * forward


# ---- accuracy


def test_gold_is_the_stock_model_without_padding(stock):
    batches = RAGGED.batches()
    gold = accuracy.gold(stock, batches, "", torch.float64)
    assert all(p.dtype == torch.float32 for p in stock.parameters()), "the stock model is left alone"
    wide = models.build("tiny").double()
    for batch, right in zip(batches, gold, strict=True):
        valid = batch["attention_mask"].bool()
        assert (right[~valid] == 0).all()
        torch.testing.assert_close(right[valid], wide(**batch).last_hidden_state[valid], rtol=0, atol=1e-10)
    assert accuracy.wide(1e11) == torch.float64 and accuracy.wide(1e13) == torch.float32


def test_errors_are_of_valid_tokens_and_nothing_hides(stock):
    batches = RAGGED.batches()
    gold = accuracy.gold(stock, batches, "", torch.float64)
    assert accuracy.errors(gold, gold, batches) == {"max": 0.0, "mean": 0.0, "cosine": pytest.approx(1.0)}
    off = [g.clone() for g in gold]
    off[1][0, 0, 0] += 0.5
    found = accuracy.errors(gold, off, batches)
    assert found["max"] == pytest.approx(0.5) and found["mean"] == pytest.approx(0.5 / (20 * 64))
    assert accuracy.errors(gold, [-g for g in gold], batches)["cosine"] == pytest.approx(-1.0)
    off[0][1, 0, 3] = float("nan")
    found = accuracy.errors(gold, off, batches)
    assert found["max"] == math.inf and found["cosine"] == -1.0
    assert accuracy.errors(gold, [g[:, :1] for g in gold], batches)["max"] == math.inf
    for limit in accuracy.LIMITS.values():
        assert accuracy.fault(found, limit) and not accuracy.fault(accuracy.errors(gold, gold, batches), limit)


def test_one_logit_a_sequence_is_compared_as_one_vector():
    batch = Workload("some", (3, 2)).batches()
    gold = [torch.tensor([[1.0], [-1.0]])]
    assert accuracy.errors(gold, [torch.tensor([[0.1], [0.1]])], batch)["cosine"] == pytest.approx(0.0, abs=1e-9)
    assert accuracy.errors(gold, [2 * gold[0]], batch)["cosine"] == pytest.approx(1.0)


def test_errors_of_gradients():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert training.errors((2.0, [a, None]), (2.5, [a, None])) == {"max": 0.5, "mean": 0.0, "cosine": 1.0}
    found = training.errors((2.0, [a, b]), (2.0, [a, None]))
    assert found["cosine"] == pytest.approx(0.5**0.5) and found["mean"] == 0.25
    nan = training.errors((2.0, [a]), (float("nan"), [a * float("nan")]))
    for wrong in (nan, {**found, "max": float("nan"), "cosine": 1.0}, {**found, "max": 0.0, "cosine": float("nan")}):
        assert accuracy.fault(wrong, accuracy.TRAINING_LIMITS["bfloat16"])


def test_labels_are_on_valid_tokens_only():
    (batch,) = Workload("some", (200, 1, 50)).batches()
    labels = training.labelled(batch)["labels"]
    there = labels != -100
    assert not there[batch["attention_mask"] == 0].any() and there[:, 0].all()
    assert torch.equal(labels[there], batch["input_ids"][there])
    assert 0.05 < there.sum() / 251 < 0.3


# ---- peers made ready


def test_a_peer_is_prepared_once_for_a_model_and_anew_for_a_shape(stock):
    made = []

    def prepare(setting):
        made.append(setting.precision)
        return len(made)

    contenders = Contenders("cpu", 1)
    for _ in range(2):
        for precision in ("float32", "bfloat16"):
            ready = contenders.get(peer("engine", prepare), stock, "", precision, {})
            assert isinstance(ready, Ready) and ready.seconds >= 0
    assert made == ["float32", "bfloat16"]
    contenders.get(peer("engine", prepare), models.build("tiny"), "", "float32", {})
    assert len(made) == 3, "another model"
    for _ in range(2):
        contenders.get(peer("compile", prepare), stock, "", "float32", {})
    assert len(made) == 5, "what is compiled for a shape is compiled for each"


def test_a_refusal_is_remembered_and_the_time_for_preparing_ends(stock):
    tries = []

    def prepare(setting):
        tries.append(1)
        time.sleep(0.02)
        raise Unavailable("no")

    contenders = Contenders("cpu", 1, allowance=0.01, needed=("bertfast",))
    for _ in range(2):
        assert contenders.get(peer("engine", prepare), stock, "", "float32", {}) == Refused("skipped", "no")
    assert len(tries) == 1
    late = contenders.get(peer("late", honest), stock, "", "float32", {})
    assert late.status == "skipped" and "time for preparing is used up" in late.reason
    assert isinstance(contenders.get(peer("bertfast", honest), stock, "", "float32", {}), Ready)


def test_a_workload_compares_no_longer_than_its_share(tmp_path, monkeypatch):
    """Those that have to be there come first, and have no limit."""
    monkeypatch.setattr(harness, "_COMPARING", 0.0)
    peers = [peer("engine", honest), peer("bertfast", honest), peer("hf-sdpa", honest)]
    records, _ = measure(tmp_path, [Case(RAGGED, "tiny", peers)])
    found = by_peer(records)
    assert [name for name, _ in found] == ["engine", "bertfast", "hf-sdpa"]
    assert found["bertfast", "float32"]["status"] == found["hf-sdpa", "float32"]["status"] == "measured"
    late = found["engine", "float32"]
    assert late["status"] == "skipped" and results.OUT_OF_TIME in late["reason"]


# ---- ceilings and floors


def test_the_floor_of_a_model_counted_by_hand():
    class Config:
        hidden_size, intermediate_size, num_hidden_layers, vocab_size = 2, 3, 1, 10

    steps = roofline.forward(Config, (4, 1), "bfloat16")
    flops = {s.name: s.flops for s in steps}
    assert flops["query, key, value"] == 2 * 5 * 6 * 2 and flops["attention output"] == 2 * 5 * 2 * 2
    assert flops["up"] == flops["down"] == 2 * 5 * 3 * 2
    assert flops["attention"] == 4 * (16 + 1) * 2, "of each sequence with itself"
    nbytes = {s.name: s.nbytes for s in steps}
    assert nbytes["up"] == 2 * (5 * 2 + 3 * 2 + 5 * 3) and nbytes["attention"] == 2 * 5 * 2 * 4
    assert [s.name for s in steps].count("residual and norm") == 2
    up = next(s for s in steps if s.name == "up")
    assert up.floor({"copy": 1.0, "bfloat16": 1e9}, "bfloat16") == 62.0
    assert up.floor({"copy": 1e9, "bfloat16": 1.0}, "bfloat16") == 60.0
    assert up.floor({"copy": 1.0, "read": 2.0, "bfloat16": 1e9}, "bfloat16") == 31.0
    assert roofline.floor(steps, {"copy": 1.0}, "bfloat16") is None
    total = roofline.floor(steps, {"copy": 1.0, "bfloat16": 1e-9}, "bfloat16")
    norms = sum(s.nbytes for s in steps if not s.flops)
    assert total == pytest.approx(1e9 * sum(s.flops for s in steps) + norms)

    trained = roofline.training(Config, (4, 1), "bfloat16", 100)
    gemms = [s for s in trained if s.name.startswith("up")]
    assert sum(s.flops for s in gemms) == 3 * flops["up"]
    assert (
        sum(s.flops for s in trained if s.name.startswith("attention") and "output" not in s.name) == 3.5 * 4 * 17 * 2
    )
    assert trained[-1].nbytes == 2800
    decoder = next(s for s in trained if s.name == "decoder")
    assert decoder.flops == pytest.approx(2 * 0.15 * 5 * 10 * 2), "labelled positions only"


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "_COPY", {"cpu": 1 << 20})
    monkeypatch.setattr(ceilings, "_ROWS", 16)
    found = ceilings.measured("cpu", seconds=0.01)
    assert set(found) == {"copy", "read", "float32", "bfloat16", "int8"} and all(v > 1e7 for v in found.values())


@pytest.mark.skipif(native.cpu is None, reason="needs the CPU kernels")
def test_a_gemm_of_our_own_that_is_faster_raises_the_ceiling(monkeypatch):
    tried = []

    def measure(device, candidates, seconds):
        tried.append(set(candidates))
        for candidate in candidates.values():
            for call in candidate.make():
                call()
        return {name: timing.Timing(2.0 - (name == "bertfast packed"), 0.0, 0.0, 5, "") for name in candidates}, {}

    monkeypatch.setattr(timing, "measure", measure)
    assert ceilings.gemm("cpu", "float32", 4, 8, 16)["flops"] == 2 * 4 * 8 * 16
    assert tried == [{"library", "onednn packed", "bertfast packed"}]


# ---- results


def test_results_of_other_schemas_are_passed_over(tmp_path, capsys):
    writer = results.Writer(tmp_path / "some" / "out.jsonl")
    writer.write("environment", threads=2)
    writer.write("measurement", workload="a")
    with writer.path.open("a") as file:
        file.write('{"benchmark": "encoder"}\n\n[1]\n{"schema": 1, "record": "measurement"}\n{"torn')
    environments, measurements = results.read(writer.path)
    assert environments == {writer.run: {"schema": 2, "record": "environment", "run": writer.run, "threads": 2}}
    assert [m["workload"] for m in measurements] == ["a"]
    first, second = capsys.readouterr().err.splitlines()
    assert "passed over 2 lines (3, 6), not of schema 2" in first and "passed over 2 lines (5, 7), no JSON" in second
    assert results.Writer(writer.path).run != writer.run


# ---- the command


@pytest.fixture
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "measured", lambda device: CEILINGS)


def test_the_command_measures_what_exists_and_says_what_does_not(tmp_path, capsys, quick_ceilings):
    (tmp_path / "empty.txt").write_text("\n")
    out = tmp_path / "out.jsonl"
    arguments = ["--workload", "1x16", "1x61", "--model", "tiny", "tinny", "--peer", "bertfast", "bertfats"]
    arguments += ["--texts", str(tmp_path / "empty.txt"), "--seconds", "5", "--threads", "1", "--output", str(out)]
    assert command.main([*arguments, "--precision", "float32"]) == 2
    said = capsys.readouterr()
    for words in ("unknown workload '1x61'", "unknown model 'tinny'", "unknown peer 'bertfats'", "holds no text"):
        assert sum(words in line for line in said.err.splitlines()) == 1, said.err
    environments, measurements = results.read(out)
    (environment,) = environments.values()
    assert environment["ceilings"] == CEILINGS and environment["threads"] == 1 and "commit" in environment
    found = by_peer(measurements)
    assert set(found) == {("hf-sdpa", "float32"), ("bertfast", "float32")}, "the baseline is always there"
    assert {r["status"] for r in found.values()} == {"measured"} and "bertfast" in said.out
    assert json.loads(out.read_text().splitlines()[-1])["record"] == "harness"


@pytest.mark.parametrize(("name", "status"), [("bertfast", 1), ("hf-eager", 0)])
def test_the_command_fails_where_bertfast_is_wrong(tmp_path, monkeypatch, quick_ceilings, name, status):
    monkeypatch.setitem(PEERS, name, peer(name, changed(lambda output, batch: output + 1)))
    arguments = ["--workload", "1x16", "--model", "tiny", "--peer", name, "--precision", "float32", "--seconds", "5"]
    assert command.main([*arguments, "--threads", "1", "--output", str(tmp_path / "out.jsonl")]) == status
    assert by_peer(results.read(tmp_path / "out.jsonl")[1])[name, "float32"]["status"] == "inaccurate"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "nothing like it"], "nothing is left to measure"),
        (["--seconds", "0"], "--seconds must be greater than 0"),
        (["--seconds", "nan"], "--seconds must be greater than 0"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--device", "cuda"], "no GPU that PyTorch sees"),
        (["--texts", "nowhere.txt"], "there is no text file nowhere.txt"),
    ],
)
def test_the_command_refuses_in_a_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([*arguments, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def cases(*arguments):
    found, status = command._cases(command.parse(list(arguments)))
    assert status == 0
    return found


def test_sets_and_who_takes_part():
    quick = cases()
    assert [(c.workload.name, c.model) for c in quick] == command.SETS["quick"]
    assert {p.name for c in quick for p in c.peers} == set(command.SHORTLIST) <= set(PEERS)
    full = {(c.workload.name, c.model): {p.name for p in c.peers} for c in cases("--set", "full")}
    assert list(full) == command.SETS["full"]
    assert full["8x128", "base"] == set(PEERS) and full["batch 4", "base"] == set(command.SHORTLIST)
    assert full["8x128", "large"] == set(command.SHORTLIST)
    assert full["pretrain 8x128", "base"] == {*command.SHORTLIST, *command.TRAINERS} <= set(PEERS)
    named = cases("--set", "full", "--peer", "nested", "--baseline", "hf-eager", "--model", "large")
    assert {(c.model, *(p.name for p in c.peers)) for c in named} == {("large", "hf-eager", "nested")}
    assert {c.workload.name for c in cases("--model", "tiny")} == {n for n, m in command.SETS["quick"] if m == "base"}


def test_what_a_set_lacks_is_said_and_is_no_error(monkeypatch, capsys):
    def lacking(name):
        if name == "64 sentences":
            raise ValueError("needs a package")
        return find_workload(name)

    monkeypatch.setattr(command, "find_workload", lacking)
    assert len(cases()) == len(command.SETS["quick"]) - 1 and "needs a package" in capsys.readouterr().err


def test_calibration_counts_how_often_equal_peers_seem_equal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "_SECONDS", 0.2)
    writer = results.Writer(tmp_path / "out.jsonl")
    record = calibration.run(writer, "cpu", 1, repetitions=3, model="tiny")
    assert record["record"] == "calibration" and record["repetitions"] == 3 == len(record["ratios"])
    assert record["within"] == sum(low <= 1 <= high for _, low, high in record["ratios"])
    assert all(low <= value <= high for value, low, high in record["ratios"])
    assert f"in {record['within']} of 3 repetitions" in capsys.readouterr().out
    assert results.records(writer.path) == [record]


def test_the_overhead_of_the_harness():
    assert harness.overhead(calls=4, rounds=50, repetitions=3) < 1e-4
