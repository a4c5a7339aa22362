"""Which implementation of an op runs on these tensors, and why.

An implementation is a named set of functions that the op's module registers here; the choice depends on the op,
the device and the dtype alone, so it is made once and remembered. Automatic choice takes the first that can run,
in the order of `BACKENDS`; an explicit choice (`use("cpu")`, or the environment variable BERTFAST_BACKEND) runs or
raises `BackendError` with the reason.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bertfast import native
from bertfast.errors import BackendError

BACKENDS = ("cuda", "cpu", "reference")
_DEVICES = {"cuda": "cuda", "cpu": "cpu"}  # of the backends that are for one kind of device only
_ENVIRONMENT = "BERTFAST_BACKEND"


@dataclass(frozen=True)
class Choice:
    """What runs an op on a kind of tensor, and why each backend for that device before it was refused."""

    op: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)


_implementations: dict[tuple[str, str], Any] = {}
_choices: dict[tuple[str, str, torch.dtype], tuple[Choice, Any]] = {}
_explicit: str | None = None


def register(op: str, backend: str, implementation: Any) -> None:
    """Make `implementation` what `backend` runs for `op`. Called by the modules of `bertfast.ops`."""
    _implementations[op, backend] = implementation


def refusal(backend: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on tensors of this kind; None where it can."""
    reason = _REFUSALS[backend](device, dtype)
    if reason is None and (op, backend) not in _implementations:
        return f"has no kernel for {op}"
    return reason


def _refuse_cuda(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return f"runs on CUDA tensors, not on {device}"
    if native.cuda is None:
        return native.cuda_reason
    if torch.version.hip is not None:
        return "runs on NVIDIA's GPUs, and this PyTorch was built for AMD's"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes float32, bfloat16 and float16, not {_name(dtype)}"
    if native.cuda.device_count() == 0:
        driver, runtime = _version(native.cuda.driver_version()), _version(native.cuda.runtime_version())
        return f"finds no GPU: it was built with CUDA {runtime}, and the driver supports {driver}"
    capability = torch.cuda.get_device_capability()
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


def _refuse_cpu(device: str, dtype: torch.dtype) -> str | None:
    if native.cpu is None:
        return native.cpu_reason
    if device != "cpu":
        return f"runs on CPU tensors, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"computes float32 and bfloat16, not {_name(dtype)}"
    return None


_REFUSALS: dict[str, Callable[[str, torch.dtype], str | None]] = {
    "cuda": _refuse_cuda,
    "cpu": _refuse_cpu,
    "reference": lambda device, dtype: None,
}


def explain(op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Choice:
    """The choice for `op` on tensors of this device type and dtype, with the reason for every refusal.

    Raises BackendError where an explicit choice cannot run.
    """
    return _choose(op, torch.device(device).type, dtype)[0]


def implementation(op: str, x: torch.Tensor) -> Any:
    """The implementation that runs `op` on tensors like `x`."""
    found = _choices.get((op, x.device.type, x.dtype))
    return found[1] if found is not None else _choose(op, x.device.type, x.dtype)[1]


def _choose(op: str, device: str, dtype: torch.dtype) -> tuple[Choice, Any]:
    wanted = _explicit if _explicit is not None else _named(os.environ.get(_ENVIRONMENT, "auto"))
    refused: dict[str, str] = {}
    candidates = [b for b in BACKENDS if _DEVICES.get(b, device) == device] if wanted is None else [wanted]
    for backend in candidates:
        reason = refusal(backend, op, device, dtype)
        if reason is None:
            found = Choice(op, backend, refused), _implementations[op, backend]
            _choices[op, device, dtype] = found
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
