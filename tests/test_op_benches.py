"""The op benches: what they compare is the same, the work is counted right, and what is wrong is not timed."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.cases import lists, measurement
from benchmarks.cases.accuracy import check
from benchmarks.cases.attention import validity, varlen_attention
from benchmarks.cases.candidates import Group, Timed
from benchmarks.cases.case import BACKWARD, BOTH, FORWARD, Case
from benchmarks.cases.embedding import embed_layer_norm
from benchmarks.cases.feed_forward import feed_forward
from benchmarks.cases.gelu import bias_gelu
from benchmarks.cases.linear import projection, qkv, quantised
from benchmarks.cases.loss import masked_lm_loss
from benchmarks.cases.masked_attention import masked_attention
from benchmarks.cases.norm import residual_layer_norm
from benchmarks.cases.shapes import SHAPES, Shape
from bertfast import native, ops, reference

ROOT = Path(__file__).parent.parent
BENCHES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))
LENGTHS = (3, 1, 4)
TOLERANCE = {"float32": {"rtol": 1e-4, "atol": 1e-5}, "bfloat16": {"rtol": 2e-2, "atol": 2e-2}}


def test_every_op_is_benched_in_both_directions():
    assert len(BENCHES) == 8
    found = set()
    for name in BENCHES:
        cases = list(
            importlib.import_module(f"benchmarks.{name}").cases(Shape("3x4", 64, 2, LENGTHS), "float32", "cpu")
        )
        assert len({case.key for case in cases}) == len(cases)
        found |= {(case.op.split()[0], case.direction) for case in cases}
    public = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert found == {(op, direction) for op in public for direction in (FORWARD, BACKWARD)}


def test_shapes_are_few_tokens_full_and_ragged():
    for sets in SHAPES.values():
        assert {shape.hidden for shape in sets["full"]} == {384, 768, 1024}
        lengths = [shape.lengths for shape in sets["full"]]
        assert any(len(n) == 1 for n in lengths)
        assert any(len(n) > 1 and len(set(n)) == 1 for n in lengths) and any(len(set(n)) > 1 for n in lengths)


@pytest.mark.parametrize(
    ("case", "flops", "nbytes"),
    [
        (bias_gelu(3, 5, "bfloat16", FORWARD, "cpu"), 0, 2 * 15 * 2),
        (bias_gelu(3, 5, "float32", BACKWARD, "cpu"), 0, 3 * 15 * 4),
        (bias_gelu(3, 5, "float32", BOTH, "cpu"), 0, 5 * 15 * 4),
        (residual_layer_norm(3, 4, "float32", FORWARD, "cpu", dropout=True), 0, 3 * 12 * 4),
        (residual_layer_norm(3, 4, "float16", BACKWARD, "cpu"), 0, 4 * 12 * 2),
        (residual_layer_norm(3, 4, "float32", BACKWARD, "cpu", dropout=True), 0, 5 * 12 * 4),
        # Three ids of 8 bytes; a row of each table, the types' both, and the output.
        (embed_layer_norm(1, 4, "float32", FORWARD, "cpu"), 0, 24 + (1 + 1 + 2 + 1) * 4 * 4),
        (embed_layer_norm(1, 4, "float32", BACKWARD, "cpu"), 0, 24 + (5 + 30000 + 512 + 2) * 4 * 4),
        (projection(2, 3, 5, "gelu", "float32", "cpu"), 2 * 2 * 3 * 5, (10 + 15 + 6) * 4),
        (projection(2, 3, 5, "none", "float32", "cpu", BACKWARD), 4 * 2 * 3 * 5, (20 + 30 + 6) * 4),
        (projection(2, 3, 5, "gelu", "float32", "cpu", BACKWARD), 4 * 2 * 3 * 5, (20 + 30 + 12) * 4),
        (qkv(2, 4, "bfloat16", "cpu"), 2 * 2 * 12 * 4, (8 + 48 + 24) * 2),
        (feed_forward(2, 3, 5, "float32", FORWARD, "cpu"), 4 * 2 * 3 * 5, (12 + 30) * 4),
        (feed_forward(2, 3, 5, "float32", BACKWARD, "cpu"), 8 * 2 * 3 * 5, (18 + 10 + 60) * 4),
        (quantised(2, 3, 5, "none"), 2 * 2 * 3 * 5, 10 * 4 + 15 + 6 * 4),
        # One of five tokens is labelled.
        (masked_lm_loss(5, 3, "float32", FORWARD, "cpu", vocabulary=7), 2 * 7 * 3, (3 + 28) * 4),
        (masked_lm_loss(5, 3, "float32", BACKWARD, "cpu", vocabulary=7), 4 * 7 * 3, (3 + 15 + 56) * 4),
        # Sequences of 2 and 3 tokens: 4 + 9 pairs, each 64 products in two heads of 32.
        (varlen_attention((2, 3), 2, 32, "float32", FORWARD, "cpu", "x"), 4 * 13 * 64, 4 * 5 * 64 * 4),
        (varlen_attention((2, 3), 2, 32, "float32", BACKWARD, "cpu", "x"), 10 * 13 * 64, 8 * 5 * 64 * 4),
        (varlen_attention((2, 3), 2, 32, "float32", BOTH, "cpu", "x"), 14 * 13 * 64, 12 * 5 * 64 * 4),
        # Three queries see three keys, three see one; the mask has six bytes.
        (masked_attention((3, 1), 2, 32, "float32", FORWARD, "cpu", "x"), 4 * 12 * 64, 4 * 6 * 64 * 4 + 6),
        (masked_attention((3, 1), 2, 32, "float32", BACKWARD, "cpu", "x"), 10 * 12 * 64, 8 * 6 * 64 * 4 + 6),
    ],
    ids=lambda value: value.key if isinstance(value, Case) else "",
)
def test_work_counted_by_hand(case, flops, nbytes):
    assert case.flops == flops and case.nbytes == pytest.approx(nbytes)


CASES = {
    "gelu": lambda direction: bias_gelu(5, 12, "float32", direction, "cpu"),
    "norm": lambda direction: residual_layer_norm(5, 12, "float32", direction, "cpu"),
    "embedding": lambda direction: embed_layer_norm(5, 12, "float32", direction, "cpu"),
    "linear": lambda direction: projection(5, 12, 8, "gelu", "float32", "cpu", direction),
    "feed_forward": lambda direction: feed_forward(5, 8, 12, "float32", direction, "cpu"),
    "loss": lambda direction: masked_lm_loss(5, 8, "float32", direction, "cpu", vocabulary=11),
    "qkv": lambda direction: qkv(5, 8, "float32", "cpu", direction),
    "attention": lambda direction: varlen_attention(LENGTHS, 2, 8, "float32", direction, "cpu", "x"),
    "masked_attention": lambda direction: masked_attention(LENGTHS, 2, 8, "float32", direction, "cpu", "x"),
}


@pytest.mark.parametrize("name", CASES)
def test_peers_compute_the_same(name):
    case = CASES[name](FORWARD)
    inputs = case.inputs(0)
    (gold,) = case.results(case.gold, inputs)
    peers = dict(case.peers)
    assert peers and case.compiled in (None, peers["eager"].function if "eager" in peers else None)
    for peer in peers.values():
        out = case.call(peer.function, peer.inputs(inputs))()
        out = torch.cat(out, dim=1) if isinstance(out, tuple) else out
        if out.shape != gold.shape:  # padded
            out = out.transpose(1, 2)[validity(LENGTHS)]
        torch.testing.assert_close(out, gold, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [partial(projection, 5, 12, 8, "gelu"), partial(qkv, 5, 8)], ids=["gelu", "qkv"])
def test_packed_weights_are_compared_with_those_that_onednn_packs(make, dtype):
    case = make(dtype, "cpu", packed=True)
    assert "oneDNN packed" not in make(dtype, "cpu").peers
    inputs, peer = case.inputs(0), case.peers["oneDNN packed"]
    (gold,) = case.results(case.gold, inputs)
    made = peer.inputs(inputs)
    assert any(torch.is_tensor(t) and t.is_mkldnn for t in made), "packed outside of what is timed"
    torch.testing.assert_close(case.call(peer.function, made)(), gold, check_dtype=False, **TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_int8_is_exact_to_its_specification_and_compared_with_both(activation):
    case = quantised(33, 40, 64, activation)
    inputs = case.inputs(0)
    found = check(case, ["cpu", "reference"], inputs)
    if native.cpu is not None:
        assert found["cpu"]["accurate"] and found["cpu"]["error"] < 1e-5
    assert "only the CPU kernels" in found["reference"]["refused"]
    # What is not rounded at all, or with one scale for all rows, is off by more than the specification allows.
    for peer in case.peers.values():
        out = case.call(peer.function, peer.inputs(inputs))()
        error = (out - case.results(case.gold, inputs)[0]).abs().max()
        assert out.dtype == torch.float32 and 1e-4 < error < 0.1
    if torch.backends.mkldnn.is_available():
        u, *_, weight, _, _, _ = case.peers["oneDNN u8 s8"].inputs(inputs)
        assert u.dtype == torch.uint8 and weight.is_mkldnn


@pytest.mark.parametrize("name", CASES)
def test_a_backward_gives_everybody_the_gradients_of_all_inputs(name):
    case = CASES[name](BACKWARD)
    inputs = case.inputs(0)
    for peer in case.peers.values():
        made = peer.inputs(inputs)
        gradients = case.call(peer.function, made)()
        assert [g.shape for g in gradients] == [t.shape for t in made if torch.is_tensor(t) and t.requires_grad]


def test_each_small_case_is_right_on_the_reference():
    for case in lists.small("cpu"):
        found = check(case, ["reference", "cuda"], case.inputs(0))
        assert found["reference"]["accurate"] and "runs on CUDA tensors" in found["cuda"]["refused"], case.key


@pytest.mark.parametrize(
    ("direction", "ours", "finite"),
    [
        (FORWARD, lambda x, bias: reference.bias_gelu(x, bias) + 1e-3, True),
        (FORWARD, lambda x, bias: reference.bias_gelu(x, bias).where(x != x[0, 0], torch.nan), False),
        (BACKWARD, lambda x, bias: reference.bias_gelu(x, bias) + 0.01 * (bias - bias.detach()), True),
    ],
    ids=["off", "not finite", "a wrong gradient"],
)
def test_what_is_wrong_is_found(direction, ours, finite):
    case = CASES["gelu"](direction)
    found = check(replace(case, ours=ours), ["reference"], case.inputs(0))["reference"]
    assert not found["accurate"] and found["finite"] == finite
    assert check(case, ["reference"], case.inputs(0))["reference"]["accurate"]


def test_the_ratio_is_to_the_best_peer():
    group = Group(CASES["gelu"](FORWARD), ("reference",), seconds=0.02)
    seconds = {"slow": 0.006, "best": 0.004}
    group.peers = {name: Timed(lambda s=s: time.sleep(s), s) for name, s in seconds.items()}
    found = measurement.ratio(group, Timed(lambda: time.sleep(0.001), 0.001))
    assert found["peer"] == "best" and found["rounds"] >= measurement.LEAST_ROUNDS
    assert 1.2 < found["low"] <= found["value"] <= found["high"]


WRONG = """
from bertfast import backend, ops, reference

def wrong(x, bias, approximate):
    return 1.01 * reference.bias_gelu(x, bias, approximate)

backend.register("bias_gelu", "reference", (wrong, None))
"""


def run(*arguments, modules=""):
    """pytest on benches, as a process of its own on the CPU, which is no worker of parallel tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(modules)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_benches_write_what_became_of_them_and_time_nothing_that_is_wrong(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    output, table = tmp_path / "ops.jsonl", tmp_path / "table.json"
    done = run(
        *(
            "benchmarks/bench_gelu.py",
            "benchmarks/bench_masked_attention.py",
            "-k",
            "forward and float32 and (16x3072 or 1x16)",
        ),
        *("--benchmark-only", "--op-output", output, "--benchmark-json", table, "-rs", "-p", "wrong"),
        modules=tmp_path,
    )
    assert done.returncode == 1 and "inaccurate on reference, so not timed: off by 1.0e-02" in done.stdout, done.stdout
    environment, *lines, noise = (json.loads(line) for line in output.read_text().splitlines())
    assert environment["record"] == "environment" and environment["versions"]["torch"] == torch.__version__
    assert {(line["schema"], line["record"], line["run"]) for line in lines} == {(2, "op", environment["run"])}
    assert (
        noise["record"] == "noise"
        and noise["noisy"] in (True, False)
        and re.search("^(noise|NOISY): ", done.stdout, re.M)
    )
    found = {(line["op"], line["backend"]): line for line in lines}
    assert len(found) == len(lines) == 7

    wrong = found["bias_gelu", "reference"]
    assert wrong["status"] == "inaccurate" and wrong["error"] == pytest.approx(0.01, rel=0.1)
    assert "median_s" not in wrong and "where PyTorch is off by" in wrong["reason"]
    refused = found["masked_attention", "cpu"]
    assert refused["status"] == "skipped" and "median_s" not in refused and refused["reason"] in done.stdout
    eager, ours = found["bias_gelu", "eager"], found["masked_attention", "reference"]
    assert (eager["ours"], eager["ratio_to"], eager["error"]) == (False, None, None)
    assert ours["ours"] and ours["ratio_to"]["peer"] in ("eager", "sdpa") and ours["error"] < 1e-5
    assert 0 < ours["ratio_to"]["low"] <= ours["ratio_to"]["value"] <= ours["ratio_to"]["high"]
    assert f"{ours['ratio_to']['value']:.2f} (" in done.stdout
    for line in (eager, ours):
        assert line["status"] == "measured" and line["rounds"] >= 5
        assert 0 < line["low_s"] <= line["median_s"] <= line["high_s"]
        assert line["gb_per_second"] == pytest.approx(line["bytes"] / line["median_s"] / 1e9)
        assert line["gflops"] == pytest.approx(line["flops"] / line["median_s"] / 1e9)
    measured = json.loads(table.read_text())["benchmarks"]
    assert {each["extra_info"]["backend"] for each in measured if each["group"].startswith("bias")} >= {"eager"}
    assert all(each["extra_info"]["bytes"] > 0 for each in measured)
    assert len(measured) == sum(line["status"] == "measured" for line in lines)


def test_a_backend_that_is_unknown_is_said_to_be():
    done = run("benchmarks/bench_gelu.py", "--op-backends", "cpu,gpu")
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "unknown backend 'gpu': choose from cuda, triton, cpu, reference" in done.stderr
