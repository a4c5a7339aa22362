"""Which implementation of an op runs on these tensors, and why.

An implementation is a named set of functions that the op's module registers here. The choice depends on the op, the
device, the dtype and the op's class of shapes alone, so it is made once and remembered. Automatic choice takes the
first that can run, in the order of `PREFERENCES` where they name the op on that GPU and of `BACKENDS` elsewhere; an
explicit choice (`use("cpu")`, or the environment variable BERTFAST_BACKEND) runs or raises `BackendError` with the
reason.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bertfast import native
from bertfast.errors import BackendError

BACKENDS = ("cuda", "triton", "cpu", "reference")
_DEVICES = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}  # of the backends that are for one kind of device only
# The order of the backends by (op, major compute capability), where a measurement on such a GPU says so, and by
# (op, None) for every other GPU.
PREFERENCES: dict[tuple[str, int | None], tuple[str, ...]] = {("linear", None): ("cuda", "reference")}
_ENVIRONMENT = "BERTFAST_BACKEND"


@dataclass(frozen=True)
class Choice:
    """What runs an op on a kind of tensor, and why each backend for that device before it was refused."""

    op: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)


class Later:
    """The functions `names` of `module`, which is imported when an implementation is first chosen."""

    def __init__(self, module: str, *names: str) -> None:
        self.module, self.names = module, names

    def load(self) -> Any:
        """The functions themselves: a tuple of them, or the only one."""
        module = importlib.import_module(self.module)
        functions = tuple(getattr(module, name) for name in self.names)
        return functions if len(functions) > 1 else functions[0]


@dataclass(frozen=True)
class _Implementation:
    functions: Any
    refuse: Callable[[torch.dtype, Any], str | None] | None


_implementations: dict[tuple[str, str], _Implementation] = {}
_choices: dict[tuple[str, torch.device, torch.dtype, Hashable], tuple[Choice, Any]] = {}
_explicit: str | None = None


def register(
    op: str,
    backend: str,
    implementation: Any,
    refuse: Callable[[torch.dtype, Any], str | None] | None = None,
) -> None:
    """Make `implementation` what `backend` runs for `op`. Called by the modules of `bertfast.ops`.

    implementation: a function or a tuple of them, or a `Later`. refuse(dtype, shape): why it cannot run tensors of this
    dtype and class of shapes, whatever the op's module calls so; None where it can.
    """
    _implementations[op, backend] = _Implementation(implementation, refuse)


def refusal(backend: str, op: str, device: torch.device, dtype: torch.dtype, shape: Hashable = None) -> str | None:
    """Why `backend` cannot run `op` on tensors of this kind; None where it can."""
    reason = _REFUSALS[backend](device, dtype)
    if reason is not None:
        return reason
    found = _implementations.get((op, backend))
    if found is None:
        return f"has no kernel for {op}"
    return None if found.refuse is None or shape is None else found.refuse(dtype, shape)


def _refuse_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"runs on CUDA tensors, not on {device.type}"
    if native.cuda is None:
        return native.cuda_reason
    if torch.version.hip is not None:
        return "runs on NVIDIA's GPUs, and this PyTorch was built for AMD's"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes float32, bfloat16 and float16, not {_name(dtype)}"
    if native.cuda.device_count() == 0:
        driver, runtime = _version(native.cuda.driver_version()), _version(native.cuda.runtime_version())
        return f"finds no GPU: it was built with CUDA {runtime}, and the driver supports {driver}"
    capability = torch.cuda.get_device_capability(device)
    architectures = native.cuda.architectures()
    if not has_code_for(capability, architectures):
        return f"was built for sm_{', '.join(architectures)}, not for sm_{capability[0]}{capability[1]}"
    return None


def has_code_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a build for `architectures`, as the native module names them, runs on a GPU of this capability.

    "86" is machine code for 8.6 and the later 8.x; "90a" for 9.0 alone; "100+PTX" is compiled by the driver for 10.0
    and everything later.
    """
    for name in architectures:
        built = divmod(int(name.removesuffix("+PTX").rstrip("af")), 10)
        if name.endswith("+PTX"):
            fits = capability >= built
        else:
            fits = capability == built or (not name.endswith("a") and capability[0] == built[0] and capability > built)
        if fits:
            return True
    return False


def _version(number: int) -> str:
    """A CUDA version as CUDA counts them, 13000 for 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none (there is no driver)"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU, and were asked to by TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refuse_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" and not interpreting():
        return f"runs on CUDA tensors, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed: pip install triton"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes float32, bfloat16 and float16, not {_name(dtype)}"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"needs a GPU of compute capability 8.0 or more, and this one has {major}.{minor}"
    return None


def _refuse_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if native.cpu is None:
        return native.cpu_reason
    if device.type != "cpu":
        return f"runs on CPU tensors, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"computes float32 and bfloat16, not {_name(dtype)}"
    return None


_REFUSALS: dict[str, Callable[[torch.device, torch.dtype], str | None]] = {
    "cuda": _refuse_cuda,
    "triton": _refuse_triton,
    "cpu": _refuse_cpu,
    "reference": lambda device, dtype: None,
}


def explain(
    op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, shape: Hashable = None
) -> Choice:
    """The choice for `op` on tensors of this device and dtype, with the reason for every refusal.

    shape: the op's class of shapes, as its module hands it to `implementation`; None leaves out limits on shapes.
    Raises BackendError where an explicit choice cannot run.
    """
    return _choose(op, torch.device(device), dtype, shape)[0]


def implementation(op: str, x: torch.Tensor, shape: Hashable = None) -> Any:
    """The implementation that runs `op` on tensors like `x`, of this class of shapes."""
    found = _choices.get((op, x.device, x.dtype, shape))
    return found[1] if found is not None else _choose(op, x.device, x.dtype, shape)[1]


def _order(op: str, device: torch.device) -> tuple[str, ...]:
    """The backends for this device, in the order in which they are tried."""
    order = BACKENDS
    if device.type == "cuda" and torch.cuda.is_available():
        major, _ = torch.cuda.get_device_capability(device)
        order = PREFERENCES.get((op, major), PREFERENCES.get((op, None), BACKENDS))
    return tuple(b for b in order if _DEVICES.get(b, device.type) == device.type)


def _choose(op: str, device: torch.device, dtype: torch.dtype, shape: Hashable) -> tuple[Choice, Any]:
    wanted = _explicit if _explicit is not None else _named(os.environ.get(_ENVIRONMENT, "auto"))
    refused: dict[str, str] = {}
    for backend in _order(op, device) if wanted is None else (wanted,):
        reason = refusal(backend, op, device, dtype, shape)
        if reason is None:
            functions = _implementations[op, backend].functions
            found = Choice(op, backend, refused), functions.load() if isinstance(functions, Later) else functions
            _choices[op, device, dtype, shape] = found
            return found
        refused[backend] = reason
    raise BackendError(
        f"the {wanted} backend was asked for, but it {refused[str(wanted)]}; "
        f"choose another with bertfast.backend.use(...) or unset {_ENVIRONMENT}"
    )


def _named(name: str) -> str | None:
    if name == "auto":
        return None
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(('auto', *BACKENDS))}")
    return name


def current() -> str:
    """The explicit choice in force, or "auto"."""
    name = _explicit if _explicit is not None else _named(os.environ.get(_ENVIRONMENT, "auto"))
    return name or "auto"


def select(name: str) -> None:
    """Run every op on the named backend from now on; "auto" goes back to choosing. Raises BackendError if unknown."""
    global _explicit
    _explicit = _named(name)
    _choices.clear()


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run every op inside the block on the named backend ("auto" chooses). Raises BackendError if unknown.

    The choice is the process's, not the thread's.
    """
    global _explicit
    before = _explicit
    select(name)
    try:
        yield
    finally:
        _explicit = before
        _choices.clear()
