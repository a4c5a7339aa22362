"""What a launcher would have the compiler make: its launches, caught on their way, with tensors that have no memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.static.architectures import ARCHITECTURES
from bertfast.kernels import hardware


class Kernel(NamedTuple):
    """A kernel as it is specialised for one launch."""

    source: ASTSource  # with the types of the arguments, the constants, and which numbers 16 divides
    target: GPUTarget
    options: Any  # warps, stages, ...
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.source.fn.__name__


def kernels(call: Callable[[], Any], architecture: int) -> list[Kernel]:
    """The kernels that call() launches where the GPU is of this architecture; none of them runs."""
    with _caught(architecture) as found:
        call()
    return found


@contextmanager
def _caught(architecture: int) -> Iterator[list[Kernel]]:
    target = GPUTarget("cuda", architecture, 32)
    compiler = make_backend(target)
    found: list[Kernel] = []

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
        bind = create_function_from_signature(function.signature, function.params, compiler)
        bound, specialization, given = bind(*args, **kwargs)
        # The same method that finds these out for a launch.
        options, signature, constants, attributes = function._pack_args(compiler, kwargs, bound, specialization, given)
        source = ASTSource(function, signature, constants, attributes)
        names = list(signature)
        found.append(Kernel(source, target, options, {names[path[0]]: value for path, value in constants.items()}))

    before = JITFunction.run
    JITFunction.run = run
    try:
        with hardware.pretend(architecture, ARCHITECTURES[architecture].multiprocessors):
            yield found
    finally:
        JITFunction.run = before
