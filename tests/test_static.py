"""The gates on the kernels' machine code: each of them seen to shut, and all of them open for the kernels as is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.static import baseline, cuda, gates, machine, sass
from benchmarks.static.architectures import occupancy, resident_blocks
from benchmarks.static.baseline import Key, Row

HERE = Path(__file__).parent
ROOT = HERE.parent


def python(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own, which compiles kernels rather than interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(HERE), environment.get("PYTHONPATH", "")))
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """What the gates say of each of static_probes.py."""
    done = python(str(HERE / "static_probes.py"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["nothing", "matrix", "shorter"])
def test_what_passes(said, name):
    assert said[name] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spills", "bytes of stack"),
        ("narrow loads", "narrow loads: 0% of the bytes in 128 bits, under 50% (32 of 16 bits)"),
        ("narrow stores", "narrow stores: 0% of the bytes in 128 bits, under 50% (32 of 16 bits)"),
        ("no matrix", "no matrix instructions"),
        ("no bulk", "tiles are not moved by the tensor memory accelerator"),
        ("occupancy", "under 0.90"),
        ("shared", "bytes of shared memory, of 101376"),
        ("serialised", "wgmma is serialised"),
        ("does not compile", "does not compile: CompilationError"),
        ("longer", "instructions in its loop"),
    ],
)
def test_what_does_not(said, name, words):
    assert any(words in reason for reason in said[name]), said[name]


def row(kernel="_bias_gelu_fwd_kernel", case="base", architecture=90, compiler="triton 1", **counts):
    counts = {"instructions": 100, "loop": 0, **counts}
    code = sass.Code(**dict.fromkeys(sass.Code._fields, 0) | {w: {} for w in ("loads", "stores", "copies", "matrix")})
    made = machine.Machine(code=code._replace(**counts))
    return Row(Key(compiler, kernel, case, architecture), made, half=True)


def lines(*rows):
    return {r.key: r.machine.as_json() for r in rows}


@pytest.mark.parametrize(
    ("now", "before", "reasons"),
    [
        (row(instructions=105), row(), []),
        (row(instructions=106), row(), ["106 instructions, 100 in the baseline"]),
        (row(instructions=900, loop=20), row(loop=20), []),
        (row(loop=22), row(loop=20), ["22 instructions in its loop, 20 in the baseline"]),
        (row(instructions=200, loop=20), row(), ["200 instructions, 100 in the baseline"]),
        (row(case="large"), row(), ["not in the baseline"]),
        (row(instructions=900, compiler="triton 2"), row(), []),  # which makes other code
    ],
)
def test_the_baseline(now, before, reasons):
    assert baseline.regressions([now], lines(before)).get(now.key, []) == reasons


def test_lines_of_the_baseline_that_are_no_longer_made():
    gone, elsewhere = row(case="gone"), row(case="gone", architecture=80)
    found = baseline.regressions([row()], lines(row(), gone, elsewhere))
    assert found == {gone.key: ["in the baseline, but no longer made"]}  # elsewhere, nothing was to be made


def test_the_baseline_is_written_and_read(tmp_path):
    path = tmp_path / "baseline.jsonl"
    first, second = row(), row(architecture=80, instructions=7, loads={128: 4, 32: 1})
    third = row(compiler="nvcc 1")
    for written in ([first], [second], [third]):
        baseline.write(written, path)
    found = baseline.read(path)
    assert set(found) == {first.key, second.key, third.key}
    assert found[second.key]["loads"] == {"128": 4, "32": 1} and found[second.key]["instructions"] == 7
    newer = row(instructions=8, compiler="triton 2")
    baseline.write([newer], path)  # of one GPU: the lines of the others, and of the other compiler, stay
    assert set(baseline.read(path)) == {newer.key, second.key, third.key}


def test_every_line_of_the_baseline_has_a_rule():
    for key in baseline.read():
        gates.rule(key.kernel)
    with pytest.raises(LookupError, match="_new_kernel has no rule"):
        gates.rule("_new_kernel")


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "blocks"),
    [
        (90, 128, 0, 4, 4),  # 65536 / (128 threads of 128)
        (90, 32, 0, 4, 16),  # 64 warps
        (86, 32, 48 * 1024, 4, 2),  # 100 KiB
        (86, 32, 100 * 1024, 4, 0),
        (80, 32, 0, 1, 32),  # blocks
    ],
)
def test_occupancy(architecture, registers, shared, warps, blocks):
    assert resident_blocks(architecture, registers, shared, warps) == blocks
    assert occupancy(architecture, registers, shared, warps) == blocks * warps / (48 if architecture == 86 else 64)


SASS = """
        Function : _Z4copyPf
        /*0000*/                   LDC R1, c[0x0][0x28] ;           /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;  /* 0x0 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;  /* 0x0 */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;  /* 0x0 */
        /*0050*/                   MUFU.EX2 R9, R9 ;  /* 0x0 */
        /*0060*/               @P1 BRA 0x30 ;  /* 0x0 */
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R8 ;  /* 0x0 */
        /*0080*/                   STL [R1], R8 ;  /* 0x0 */
        /*0090*/                   EXIT ;  /* 0x0 */
        /*00a0*/                   BRA 0xa0;  /* 0x0 */
        /*00b0*/                   NOP;  /* 0x0 */
"""


def test_reading_machine_code():
    ((name, text),) = sass.functions(SASS)
    code = sass.read(text)
    assert name == "_Z4copyPf" and code.instructions == 11 and code.loop == 4
    assert (code.loads, code.stores, code.copies) == ({128: 1, 16: 1}, {64: 1}, {128: 1})
    assert code.matrix == {"HGMMA": 1} and code.special == 1 and code.local == 1
    assert gates.wide_share(code.loads) == 128 / 144


def test_reading_resources():
    text = " Function _Z4copyPf:\n  REG:32 STACK:8 SHARED:5120 LOCAL:0 CONSTANT[0]:576 TEXTURE:0\n"
    assert machine.resources(text) == {"_Z4copyPf": (32, 8, 5120)}


def test_what_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CACHE", tmp_path)
    made = row(loads={128: 4}).machine
    assert machine.recall("a") is None
    machine.remember("a", [("copy", made), ("other", machine.Machine(error="no"))])
    assert machine.recall("a") == {"copy": made, "other": machine.Machine(error="no")}
    assert machine.key("a") == machine.key("a") != machine.key("b")


def test_names_of_cuda_kernels(monkeypatch):
    mangled = "_ZN8bertfast39_GLOBAL__N__f4546fcc_7_gelu_cu_ebf3800c17add_chunks_kernelI6__halfEEvPKfPT_ll"
    assert cuda._demangled([mangled]) == ["add_chunks_kernel<__half>"]
    monkeypatch.setattr(cuda.shutil, "which", lambda name, path=None: None)
    cuda.nvcc.cache_clear()
    with pytest.raises(cuda.Unavailable, match="no nvcc"):
        cuda.rows([90])
    cuda.nvcc.cache_clear()


def test_every_kernel_passes():
    """Minutes, where nothing is remembered: every line of every table, for every GPU that is named in the README."""
    if "triton" not in {key.compiler.split()[0] for key in baseline.read()}:
        pytest.fail("benchmarks/static/baseline.jsonl is empty: run python -m benchmarks.static --update")
    done = python("-m", "benchmarks.static", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_that_no_case_launches():
    code = "from benchmarks.static import cases; print(*cases.unreached(90, []), sep='\\n')"
    missing = python("-c", code).stdout
    for what in ("gelu._bias_gelu_fwd_kernel", "linear._linear_fwd_kernel", "Entry(kernel='_residual_layer_norm_bwd"):
        assert what in missing


def test_an_interpreting_process_is_refused():
    code = "import os; os.environ['TRITON_INTERPRET'] = '1'; import runpy; runpy.run_module('benchmarks.static')"
    done = python("-c", code)
    assert done.returncode and "unset it" in done.stderr
