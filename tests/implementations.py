"""Every implementation of the ops that can run on this machine: the reference, the CPU kernels of each ISA, the
CUDA kernels on the emulated GPU of cuda_host and the Triton kernels in interpreter, which take CPU tensors there."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import cuda_host
import pytest

from bertfast import backend, native

# conftest.py has imported it where it can run.
interpreter = sys.modules.get("interpreter")
CPU_NAMES = [f"cpu-{isa}" for isa in native.cpu.available_isas()] if native.cpu is not None else []
# Only what multiplies matrices has objects for avx512_vnni and avx512_bf16: setup.py.
PRODUCTS = ("attention",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test runs on each implementation that its module's op has: tests/test_gelu.py is about csrc/cuda/gelu.cu.

    A module whose CUDA kernel does less than its tests ask for says CUDA_ON_THE_HOST = False.
    """
    stem = metafunc.module.__name__.removeprefix("test_")
    on_the_host = (cuda_host.CSRC / "cuda" / f"{stem}.cu").exists() and getattr(
        metafunc.module, "CUDA_ON_THE_HOST", True
    )
    names = [name for name in CPU_NAMES if "_" not in name or stem in PRODUCTS]
    if on_the_host:
        names.append("cuda-host")
    if interpreter is not None and has_triton_kernels(stem):
        names.append("triton")
    if "native_implementation" in metafunc.fixturenames:
        metafunc.parametrize("native_implementation", names, indirect=True)
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", ["reference", *names], indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each implementation, forced."""
    yield from force(request.param)


@pytest.fixture
def native_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the CPU kernels of each instruction set and on the CUDA kernels, forced."""
    yield from force(request.param)


@pytest.fixture
def cuda_on_the_host() -> Iterator[str]:
    """Runs the test on the CUDA kernels alone, on CPU tensors."""
    yield from force("cuda-host")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the CUDA kernels: emulated, with tensors on the CPU, and on a GPU where there is one."""
    if request.param == "cpu":
        yield from (request.param for _ in force("cuda-host"))
    else:
        with backend.use("cuda"):
            yield request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the Triton kernels: interpreted, with tensors on the CPU, and on a GPU where there is one."""
    if request.param == "cpu":
        yield from (request.param for _ in force("triton"))
    else:
        with backend.use("triton"):
            yield request.param


def has_triton_kernels(stem: str) -> bool:
    """Whether an op of bertfast/ops/`stem`.py has its Triton implementation in bertfast/kernels/`stem`.py."""
    later = [found.functions for (_, name), found in backend._implementations.items() if name == "triton"]
    return any(isinstance(f, backend.Later) and f.module == f"bertfast.kernels.{stem}" for f in later)


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, the ops run on the Triton kernels, interpreted, and what a kernel does not write is NaN."""
    if interpreter is None:
        pytest.skip("needs triton, and TRITON_INTERPRET=1 where there is a GPU")
    with interpreter.poisoned(), backend.use("triton"):
        yield


@pytest.fixture
def triton_interpreted() -> Iterator[str]:
    """Runs the test on the Triton kernels alone, interpreted, on CPU tensors."""
    yield from force("triton")


def force(name: str) -> Iterator[str]:
    """Force an implementation until the generator goes on."""
    if name == "cuda-host":
        with cuda_host.emulation(), backend.use("cuda"):
            yield name
        return
    if name == "triton":
        with interpreted():
            yield name
        return
    which, _, isa = name.partition("-")
    before = native.cpu.isa() if isa else None
    try:
        if isa:
            native.cpu.set_isa(isa)
        with backend.use(which):
            yield name
    finally:
        if isa:
            native.cpu.set_isa(before)
