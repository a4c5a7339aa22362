"""The choice of an implementation: explained, obeyed or refused."""

import os
import subprocess
import sys

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


def run(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


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
