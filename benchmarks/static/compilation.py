"""Compiles Triton kernels ahead of time and reads their machine code, in two processes at a time. What was compiled
before, of the same source by the same compiler, is remembered."""

import contextlib
import io
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key

from benchmarks.static import machine, sass
from benchmarks.static.capture import Kernel
from benchmarks.static.machine import Machine

SERIALISED = "wgmma.mma_async instructions are serialized"  # ptxas, in its log

_queue: Sequence[Kernel] = ()


def version() -> str:
    return f"triton {triton.__version__}"


def compiled(kernels: Sequence[Kernel], workers: int = 2) -> list[Machine]:
    """The machine code of each."""
    global _queue
    keys = [_key(k) for k in kernels]
    found = {key: machine.recall(key) for key in keys}
    missing = {key: i for i, key in enumerate(keys) if found[key] is None}
    if missing:
        _queue = kernels
        # Forked, so that the kernels need not be sent: a jitted function cannot be pickled.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context) as pool:
            for key, made in zip(missing, pool.map(_compile, missing.values()), strict=True):
                found[key] = {"": made}
                machine.remember(key, found[key].items())
    return [found[key][""] for key in keys]


def _key(kernel: Kernel) -> str:
    """What the machine code depends on: the source with its callees, types and constants, options, the compiler."""
    compiler = make_backend(kernel.target)
    return machine.key(get_cache_key(kernel.source, compiler, kernel.options, get_cache_invalidating_env_vars()))


def _compile(index: int) -> Machine:
    kernel = _queue[index]
    knobs.compilation.always_compile = True  # or there would be no log
    knobs.nvidia.dump_ptxas_log = True
    knobs.cache.dir = str(machine.CACHE / "triton")
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            done = triton.compile(kernel.source, target=kernel.target, options=kernel.options.__dict__)
    except Exception as error:
        words = str(error).strip().splitlines()
        return Machine(error=f"{type(error).__name__}: {words[-1][:200] if words else ''}")
    cubin = done.asm["cubin"]
    (usage,) = machine.resources(sass.disassemble(cubin, "-res-usage")).values()
    ((_, text),) = sass.functions(sass.disassemble(cubin, "-sass"))
    # Of the metadata, because shared memory is dynamic and warp specialisation may have added warps.
    shared, warps = done.metadata.shared, done.metadata.num_warps
    return machine.read(text, usage[:2], shared, warps, kernel.target.arch, SERIALISED in log.getvalue())
