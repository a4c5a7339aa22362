"""The CUDA kernels without a GPU: csrc/cuda compiled for the host, and the ops running on it with CPU tensors.

`module()` builds and loads the twin of bertfast._cuda, once and then again whenever a source has changed, in
build/cuda_host. `emulation()` lets the "cuda" backend run CPU tensors on it. emulator.h says how it works and
emulator.cpp what it checks; an error there is a RuntimeError here.
"""

import ctypes
import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bertfast import backend, native
from bertfast.ops import cuda

HERE = Path(__file__).parent.resolve()
CSRC = HERE.parent.parent / "csrc"
BUILD = HERE.parent.parent / "build" / f"cuda_host-{sysconfig.get_config_var('SOABI')}"

_MODULE, _KERNELS = "_cuda.so", "libkernels.so"
_CXX_FLAGS = "-std=c++17 -g1 -fPIC -fno-strict-aliasing -ffp-contract=off -Wall"
# Calls at every access to memory, which emulator.cpp answers, and poison in what is not initialised.
_KERNEL_FLAGS = (
    "-x c++ -O1 -fsanitize=thread,alignment,bounds -ftrivial-auto-var-init=pattern"
    " -Wno-unknown-pragmas -Wno-unused-function -Wno-maybe-uninitialized"
)


def _compiler() -> list[str]:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for command in map(shlex.split, names):
        if shutil.which(command[0]) and sys.platform == "linux":
            return command
    return pytest.skip("needs Linux and a C++ compiler")


@functools.cache  # or each test would try again what has failed
def _build() -> str:
    """Compile what has changed. Returns the compiler's words where that fails."""
    import pybind11

    kernels = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "probes.cu"]
    emulator = [CSRC / "cuda" / "device.cpp", HERE / "emulator.cpp", HERE / "matrix_units.cpp"]
    bindings = CSRC / "cuda_bindings.cpp"
    flags = dict.fromkeys(emulator, "-O2 -DBERTFAST_ARCHITECTURES='\"90a\"'") | dict.fromkeys(kernels, _KERNEL_FLAGS)
    flags[bindings] = f"-fvisibility=hidden -I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    compiler = shlex.join(_compiler())
    compile_ = f"{compiler} {_CXX_FLAGS} -I{HERE / 'include'} $flags -MMD -MF $out.d -c $in -o $out"
    # The kernels' library has no thread-local variables but shared memory, which pybind11 would bring; and it must
    # not find the CUDA runtime that PyTorch may have loaded.
    link = f"{compiler} -shared $in -o $out -ldl -Wl,-Bsymbolic -Wl,-rpath,'$$ORIGIN'"
    lines = [f"rule compile\n  command = {compile_}\n  deps = gcc\n  depfile = $out.d"]
    lines.append(f"rule link\n  command = {link}")
    lines += [f"build {source.stem}.o: compile {source}\n  flags = {words}" for source, words in flags.items()]
    lines.append(f"build {_KERNELS}: link {' '.join(f'{source.stem}.o' for source in [*kernels, *emulator])}")
    lines.append(f"build {_MODULE}: link {bindings.stem}.o {_KERNELS}")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", BUILD], capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


@functools.cache
def module() -> ModuleType:
    """The twin of bertfast._cuda, with the same functions. Skips the test where there is no compiler."""
    failure = _build()
    assert not failure, failure
    spec = importlib.util.spec_from_file_location("cuda_host._cuda", BUILD / _MODULE)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@functools.cache
def controls() -> ctypes.CDLL:
    """The functions of emulator.cpp that are for tests."""
    module()
    found = ctypes.CDLL(str(BUILD / _KERNELS))
    found.cuda_host_allow.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
    found.cuda_host_shuffle.argtypes = (ctypes.c_uint64,)
    return found


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Threads and blocks run in an order drawn from the seed; 0 is in order."""
    controls().cuda_host_shuffle(seed)
    try:
        yield
    finally:
        controls().cuda_host_shuffle(0)


def _span(t: Tensor) -> int:
    """The bytes from a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() if t.numel() else 0


@contextmanager
def emulation() -> Iterator[None]:
    """Inside, the "cuda" backend takes CPU tensors, and kernels may touch the memory of the tensors they get alone."""
    launch = cuda.launch

    def launch_on_the_host(name: str, x: Tensor, *arguments: Any) -> Any:
        tensors = [t for t in (x, *arguments) if isinstance(t, Tensor)]
        for t in tensors:
            controls().cuda_host_allow(t.data_ptr(), _span(t))
        try:
            return launch(name, x, *arguments)
        finally:
            controls().cuda_host_forget()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cuda", module())
        patch.setattr(cuda, "launch", launch_on_the_host)
        patch.setitem(backend._REFUSALS, "cuda", lambda *kind: None)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        yield
