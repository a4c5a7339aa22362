"""torch.compile of the stock model with sdpa: as it is, and tuned; with shapes as they come, and dynamic at once."""

import itertools
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.derived import inference, quiet, trainable_copy, transformers_copy
from benchmarks.peers.peer import Batch, Peer, Run, Setting, Unavailable, imported

_numbers = itertools.count()


def _compile(model: nn.Module, mode: str, dynamic: bool | None) -> nn.Module:
    """The model, with its forward compiled as one graph: nothing is to run uncompiled in silence.

    PyTorch keeps by the code of a function what it compiled for it and which of its shapes have varied: models of one
    class share that. A forward whose code has a name of its own begins anew.
    """
    stock = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    own = FunctionType(code, forward.__globals__, closure=forward.__closure__)
    options = (
        {} if mode == "default" else torch._inductor.list_mode_options(mode) | {"autotune_num_choices_displayed": 0}
    )
    model.forward = torch.compile(own, fullgraph=True, dynamic=dynamic, options=options)
    return model


def _frozen(run: Run) -> Run:
    """Compiles with weights that are constants: only these get to the CPU's GEMM templates, all there is to tune there.

    PyTorch reads this from its configuration alone; among a compilation's own options it has no effect.
    """

    def frozen(batch: Batch) -> Tensor:
        with torch._inductor.config.patch(freezing=True):
            return run(batch)

    return frozen


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
    run = inference(_compile(model, mode, dynamic), setting.head)
    if mode == "max-autotune" and setting.device == "cpu":
        run = _frozen(run)
    with quiet():
        run({name: tensor.to(setting.device) for name, tensor in setting.batch.items()})
    return run


def _trainable(mode: str, dynamic: bool | None, setting: Setting) -> nn.Module:
    model = trainable_copy(setting)
    _check_compiler(setting.device)
    if mode == "max-autotune":
        mode += "-no-cudagraphs"  # a graph's outputs do not outlive its next replay, and gradients have to
    return _compile(model, mode, dynamic)


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
