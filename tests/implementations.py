"""Every implementation of the ops that can run on this machine: the reference, and the CPU kernels of each ISA."""

from collections.abc import Iterator

import pytest

from bertfast import backend, native

ISAS = native.cpu.available_isas() if native.cpu is not None else []
NAMES = ["reference", *(f"cpu-{isa}" for isa in ISAS)]
CPU_NAMES = [f"cpu-{isa}" for isa in ISAS]


@pytest.fixture(params=NAMES)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each implementation, forced."""
    yield from force(request.param)


@pytest.fixture(params=CPU_NAMES)
def native_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the CPU kernels of each instruction set, forced."""
    yield from force(request.param)


def force(name: str) -> Iterator[str]:
    """Force an implementation until the generator goes on."""
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
