"""The choice of an implementation: explained, obeyed or refused."""

import fractions
import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch

from bertfast import backend, native, ops
from bertfast.errors import BackendError

OPS = ("embed_layer_norm", "varlen_attention", "bias_gelu", "residual_layer_norm", "linear")


@pytest.mark.parametrize("op", OPS)
def test_automatic_choice_takes_the_first_that_can(op):
    with backend.use("auto"):
        choice = backend.explain(op)
        assert choice.backend == ("cpu" if native.cpu is not None else "reference")
        choice = backend.explain(op, "cpu", torch.float64)
        assert choice.backend == "reference"
        assert "float64" in choice.refused["cpu"] or native.cpu is None


def test_an_explicit_choice_runs_or_raises():
    x = torch.randn(3, 8, dtype=torch.float64)
    with backend.use("reference"):
        assert backend.current() == "reference" and backend.explain("bias_gelu").backend == "reference"
    with backend.use("cpu"), pytest.raises(BackendError, match=r"the cpu backend was asked for, but it .*use\("):
        ops.bias_gelu(x)
    ops.bias_gelu(x)


def test_the_choice_ends_with_the_block_even_after_an_error():
    before = backend.current()
    with pytest.raises(RuntimeError, match="boom"), backend.use("reference"):
        raise RuntimeError("boom")
    assert backend.current() == before


def test_unknown_backend():
    with pytest.raises(BackendError, match=r"unknown backend 'tpu': choose one of auto, "), backend.use("tpu"):
        pass


class FakeGpu:
    """A GPU as the choice of a backend sees it, on a machine without one."""

    def __init__(self, monkeypatch, capability=(9, 0), triton=True, architectures=("80", "90a", "100+PTX"), built=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        module = types.SimpleNamespace(device_count=lambda: 1, architectures=lambda: list(architectures))
        monkeypatch.setattr(native, "cuda", module if built else None)
        monkeypatch.setattr(native, "cuda_reason", "" if built else "bertfast._cuda was not built")
        find = importlib.util.find_spec
        there = lambda name, *rest: None if name == "triton" and not triton else find(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", there)
        monkeypatch.setattr(backend, "_implementations", dict(backend._implementations))
        for name in ("cuda", "triton"):
            backend.register("bias_gelu", name, f"{name}'s")


@pytest.fixture
def fake_gpu(monkeypatch):
    """fake_gpu(capability=..., triton=..., built=...): pretends; the choices made under it are forgotten."""
    with backend.use("auto"):
        yield lambda **about: FakeGpu(monkeypatch, **about)


def test_a_gpu_without_nvcc_has_triton(fake_gpu):
    fake_gpu(built=False)
    choice = backend.explain("bias_gelu", "cuda", torch.float16)
    assert choice.backend == "triton" and choice.refused == {"cuda": "bertfast._cuda was not built"}


def test_a_gpu_without_triton_has_cuda(fake_gpu):
    fake_gpu(triton=False)
    assert backend.explain("bias_gelu", "cuda", torch.float16).backend == "cuda"
    assert "pip install triton" in backend.refusal("triton", "bias_gelu", torch.device("cuda"), torch.float16)


def test_a_gpu_without_either_has_pytorch(fake_gpu):
    fake_gpu(triton=False, built=False)
    choice = backend.explain("bias_gelu", "cuda", torch.float16)
    assert choice.backend == "reference" and set(choice.refused) == {"cuda", "triton"}
    with (
        backend.use("triton"),
        pytest.raises(BackendError, match="the triton backend was asked for, but it needs the p"),
    ):
        backend.explain("bias_gelu", "cuda", torch.float16)


@pytest.mark.parametrize(
    ("about", "backend_name", "words"),
    [
        ({"capability": (7, 5), "architectures": ("80",)}, "reference", "compute capability 8.0 or more, and this one"),
        ({"capability": (12, 0)}, "cuda", ""),  # from the PTX
        ({"capability": (12, 0), "architectures": ("80", "90a")}, "triton", "was built for sm_80, 90a, not for sm_120"),
    ],
)
def test_cards(fake_gpu, about, backend_name, words):
    fake_gpu(**about)
    choice = backend.explain("bias_gelu", "cuda", torch.float32)
    assert choice.backend == backend_name and words in " ".join(choice.refused.values())


def test_float64_on_a_gpu_runs_in_pytorch(fake_gpu):
    fake_gpu()
    choice = backend.explain("bias_gelu", "cuda", torch.float64)
    assert choice.backend == "reference" and all("not float64" in why for why in choice.refused.values())


def test_a_preference_for_an_op_on_a_card(fake_gpu, monkeypatch):
    fake_gpu()
    monkeypatch.setitem(backend.PREFERENCES, ("bias_gelu", 9), ("triton", "cuda", "reference"))
    assert backend.explain("bias_gelu", "cuda", torch.float16).backend == "triton"
    backend.select("auto")
    fake_gpu(capability=(8, 0))
    assert backend.explain("bias_gelu", "cuda", torch.float16).backend == "cuda"


def test_shapes_that_an_implementation_refuses(monkeypatch):
    monkeypatch.setattr(backend, "_implementations", dict(backend._implementations))
    short = lambda dtype, shape: None if shape <= 128 else f"takes up to 128 tokens, not {shape}"  # noqa: E731
    backend.register("bias_gelu", "cpu", "the short one", short)
    with backend.use("auto"):
        x = torch.zeros(1)
        assert backend.implementation("bias_gelu", x, 128) == "the short one"
        assert backend.implementation("bias_gelu", x, 129) != "the short one"
        assert backend.explain("bias_gelu", shape=129).refused["cpu"] == "takes up to 128 tokens, not 129"


def test_kernels_are_imported_when_they_are_chosen(monkeypatch):
    monkeypatch.setattr(backend, "_implementations", dict(backend._implementations))
    backend.register("bias_gelu", "reference", backend.Later("fractions", "Fraction"))
    with backend.use("reference"):
        assert backend.implementation("bias_gelu", torch.zeros(1)) is fractions.Fraction
    backend.register("bias_gelu", "reference", backend.Later("fractions", "Fraction", "Decimal"))
    with backend.use("reference"):
        assert backend.implementation("bias_gelu", torch.zeros(1)) == (fractions.Fraction, fractions.Decimal)


def run(code, **environment):
    command = [sys.executable, "-c", code]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # conftest.py's
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=120)


def test_environment_variables():
    code = "from bertfast import backend; import bertfast.ops; print(backend.explain('linear').backend)"
    assert run(code, BERTFAST_BACKEND="reference").stdout.strip() == "reference"
    done = run(code, BERTFAST_BACKEND="tpu")
    assert done.returncode and "unknown backend 'tpu'" in done.stderr


@pytest.mark.skipif(native.cpu is None, reason=f"no native module: {native.cpu_reason}")
def test_instruction_set_from_the_environment():
    code = "from bertfast import native; print(native.cpu.isa())"
    for isa in native.cpu.available_isas():
        assert run(code, BERTFAST_CPU_ISA=isa).stdout.strip() == isa
    done = run(code, BERTFAST_CPU_ISA="mmx")
    assert done.returncode and "mmx" in done.stderr and "baseline" in done.stderr


def test_import_is_light():
    heavy = ("transformers", "triton", "sentence_transformers")
    code = f"import bertfast, sys; print([m for m in {heavy} if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"
