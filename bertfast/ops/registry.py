"""How an op is registered with torch.library, and when a call has to go through the registration.

A registered op costs 5 to 15 us a call more than the function behind it, so the public functions go through it
only where something needs to see the op: autograd, tracing (torch.compile, torch.export), a tensor subclass or a
dispatch mode.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("bertfast", "DEF")


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register `bertfast::name(...)`: one implementation for every device, its fake, and its autograd formula."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bertfast::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"bertfast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.bertfast, name)


def seen(*tensors: Tensor | None) -> bool:
    """Whether something has to see the registered op: autograd, tracing, a subclass of Tensor, a dispatch mode.

    Tensors without values, on the device "meta", are for its fake.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or tensors[0].is_meta:
        return True
    if type(tensors[0]) is not Tensor and type(tensors[0]) is not torch.nn.Parameter:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed from torch's generator of that device: (1,) int64, so `torch.manual_seed` rules it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_arguments(p: float, seed: Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """The checked dropout probability, and its seed: drawn where none was given, None where nothing is dropped."""
    p = number("dropout_p", p)
    if p == 0.0:
        return 0.0, None
    if not 0.0 < p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {p}")
    if seed is None:
        return p, draw_seed(device)
    check_tensor("seed", seed)
    if seed.dtype != torch.int64 or seed.shape != (1,):
        raise TypeError(f"seed must be an int64 tensor of shape (1,), not {_describe(seed)}")
    if seed.device != device:
        raise ValueError(f"seed is on {seed.device}, the input on {device}: move it with .to()")
    return p, seed


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise unless this is a dense tensor."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not {_describe(tensor)}")


def check_axes(name: str, tensor: Tensor, *axes: str) -> None:
    """Raise unless this is a dense floating-point tensor that has these axes."""
    check_tensor(name, tensor)
    if tensor.dim() != len(axes):
        raise ValueError(f"{name} must be ({', '.join(axes)}), not of shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating-point, not {tensor.dtype}")


def number(name: str, value: float) -> float:
    """The value; TypeError unless it is a number."""
    if not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number, not {_describe(value)}")
    return float(value)


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)}, {value.layout}"


def check_like(x: Tensor, **others: tuple[Tensor, Sequence[int]]) -> None:
    """Raise unless every named tensor has x's dtype and device and the shape that stands beside it."""
    dtype, device, dense = x.dtype, x.device, torch.strided
    for name, (tensor, shape) in others.items():
        # Nearly always all is well, and a call of an op takes microseconds.
        if (
            isinstance(tensor, Tensor)
            and tensor.dtype is dtype
            and tensor.shape == shape
            and tensor.device == device
            and tensor.layout is dense
        ):
            continue
        check_tensor(name, tensor)
        if tensor.dtype is not dtype:
            raise TypeError(f"{name} is {tensor.dtype} where x is {dtype}: convert one of them with .to()")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} where x is on {device}: move one of them with .to()")
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, row-major and without gaps; copies where they were not."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def addresses(*arguments: Any) -> list[Any]:
    """The arguments with tensors' addresses in place of tensors, and 0 in place of None."""
    return [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
