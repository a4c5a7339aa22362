"""torch.compile of the stock model with sdpa: as it is, and tuned; with shapes as they come, and dynamic at once."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.peers.derived import inference, trainable_copy, transformers_copy
from benchmarks.peers.peer import Peer, Run, Setting, Unavailable, imported


def _compile(model: nn.Module, dynamic: bool | None, options: dict[str, Any]) -> Any:
    """Whole graphs only, so that nothing runs uncompiled in silence once a model was compiled too often.

    Every call has its own count of that, where this PyTorch can: otherwise all models of a class share one.
    """
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    own = {"isolate_recompiles": True} if isolated else {}
    return torch.compile(model, fullgraph=True, dynamic=dynamic, options=options, **own)


def _options(mode: str, device: str, training: bool) -> dict[str, Any]:
    if mode == "max-autotune" and training:
        mode = "max-autotune-no-cudagraphs"  # a graph's outputs do not outlive the next replay, gradients have to
    options = torch._inductor.list_mode_options(mode)
    # Only weights that are constants get to the CPU's own GEMM templates, which are all that there is to tune.
    return options | ({"freezing": True} if mode == "max-autotune" and device == "cpu" else {})


def _check_compiler(device: str) -> None:
    """Unavailable where there is nothing to compile what inductor writes with."""
    if device == "cuda":
        imported("triton")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise Unavailable("torch.compile needs a C++ compiler, and there is none") from error


def _prepare(mode: str, dynamic: bool | None, setting: Setting) -> Run:
    model = transformers_copy(setting)
    _check_compiler(setting.device)
    run = inference(_compile(model, dynamic, _options(mode, setting.device, False)), setting.head)
    run({name: tensor.to(setting.device) for name, tensor in setting.batch.items()})
    return run


def _trainable(mode: str, dynamic: bool | None, setting: Setting) -> Any:
    model = trainable_copy(setting)
    _check_compiler(setting.device)
    return _compile(model, dynamic, _options(mode, setting.device, True))


def _peer(name: str, mode: str, dynamic: bool | None) -> Peer:
    return Peer(
        name,
        ("float32", "bfloat16", "float16"),
        ("cpu", "cuda"),
        partial(_prepare, mode, dynamic),
        partial(_trainable, mode, dynamic),
    )


# dynamic=None is what PyTorch does when not told: the first shape is compiled as it is, the second makes it dynamic.
PEERS = (
    _peer("compile", "default", None),
    _peer("compile-dynamic", "default", True),
    _peer("compile-max-autotune", "max-autotune", None),
    _peer("compile-max-autotune-dynamic", "max-autotune", True),
)
