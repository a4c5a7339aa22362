"""The native modules `_cpu` and `_cuda`: each the module, or None and the reason why not.

Neither knows PyTorch: they take addresses, sizes and a thread count or a stream. What ties them to the PyTorch of
this process happens here, at import: PyTorch comes first, because the CPU kernels run on its OpenMP threads.
"""

import ctypes
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["cpu", "cpu_reason", "cuda", "cuda_reason", "openmp"]


def _load(name: str) -> tuple[ModuleType | None, str]:
    """bertfast.<name> and "", or None and the reason in words for `bertfast doctor`."""
    try:
        return importlib.import_module(f"bertfast.{name}"), ""
    except ModuleNotFoundError:
        return None, f"bertfast.{name} was not built: no compiler for it was found, or it failed, at installation"
    except ImportError as error:  # built for another Python, or a shared library that is not here
        return None, f"bertfast.{name} does not load: {error}"


def _share_openmp(module: ModuleType) -> str:
    """Gives `module` the OpenMP runtime that PyTorch has loaded, and says which.

    A runtime of its own would start a second set of threads beside PyTorch's. Symbols of the libraries that
    libtorch_cpu depends on are found through its own handle, which leads to the one runtime in use, wherever the
    wheel, conda or the system has put it.
    """
    folder = Path(torch.__file__).parent / "lib"
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            parallel = ctypes.CDLL(str(folder / library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        module.use_openmp(ctypes.cast(parallel, ctypes.c_void_p).value)
        return f"the CPU kernels share PyTorch's OpenMP threads (GOMP_parallel through {library})"
    return f"the CPU kernels run on one thread: no GOMP_parallel in PyTorch's libraries ({folder})"


def _choose_isa(module: ModuleType) -> None:
    """BERTFAST_CPU_ISA, one of `available_isas()`, overrides the choice by the processor. ValueError if it cannot."""
    wanted = os.environ.get("BERTFAST_CPU_ISA")
    if wanted:
        try:
            module.set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"BERTFAST_CPU_ISA: {error}") from None


cpu, cpu_reason = _load("_cpu")
openmp = "the CPU kernels are not there"
if cpu is not None:
    openmp = _share_openmp(cpu)
    _choose_isa(cpu)
cuda, cuda_reason = _load("_cuda")
