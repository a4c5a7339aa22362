"""A case: an op at one shape, dtype and direction, with all that it is compared with.

Bytes are the fewest that device memory has to move, each input read once and each output written once; FLOPs are those
of the valid tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
DROPOUT = 0.1
GPU_BACKENDS = ("cuda", "triton", "reference")
CPU_BACKENDS = ("cpu", "reference")
# Memory-bound ops. Each keeps the rate of a copy where it moves nothing twice and waits for nothing.
BANDWIDTH_GOAL = {"share of copy bandwidth": 0.8}
Function = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """Another way to compute the op; convert makes its inputs of the case's, outside of what is timed.

    captured: whether a CUDA graph may hold it; False where it waits for the GPU.
    """

    function: Function
    convert: Callable[..., tuple] | None = None
    captured: bool = True

    def inputs(self, inputs: tuple) -> tuple:
        """Its inputs, of those of the case."""
        return inputs if self.convert is None else self.convert(*inputs)


@dataclass(frozen=True)
class Case:
    """An op at one shape, dtype and direction."""

    op: str
    shape: str
    dtype: str
    direction: str
    device: str
    make: Callable[[torch.Generator], tuple]  # the inputs; floating-point ones get gradients
    ours: Function
    gold: Function  # the specification, on the inputs in float64
    plain: Function  # plain PyTorch in the dtype under test: how far that is off is what ours is allowed
    peers: dict[str, Peer]
    flops: float
    nbytes: float
    gpu_backends: tuple[str, ...] = GPU_BACKENDS
    compiled: Function | None = None  # to be handed to torch.compile as a further peer
    headline: bool = False  # whether the GPU pass takes the time to compile it
    goals: dict[str, float] = field(default_factory=dict)  # of the GPU pass

    @property
    def key(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.direction}"

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends worth asking on this device."""
        return CPU_BACKENDS if self.device == "cpu" else self.gpu_backends

    def inputs(self, seed: int) -> tuple:
        """A set of inputs of its own; leaves of autograd unless only the forward is measured."""
        made = self.make(torch.Generator(self.device).manual_seed(seed))
        return made if self.direction == FORWARD else tuple(map(_leaf, made))

    def results(self, function: Function, inputs: tuple) -> list[Tensor]:
        """The output and, where a backward is measured, the gradients of the floating-point inputs."""
        if self.direction == FORWARD:
            with torch.no_grad():
                return [function(*inputs)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, _leaves(inputs), self._dout(out))]

    def call(self, function: Function, inputs: tuple) -> Callable[[], Any]:
        """What is timed. Has to be made on the stream that it is going to run on."""
        if self.direction == FORWARD:
            return lambda: _without_gradients(function, inputs)
        leaves = _leaves(inputs)
        out = function(*inputs)
        dout = tuple(map(self._dout, out)) if isinstance(out, tuple) else self._dout(out)
        if self.direction == BOTH:
            return lambda: torch.autograd.grad(function(*inputs), leaves, dout)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def _dout(self, out: Tensor) -> Tensor:
        """The same random gradient for everybody, whatever the dtype."""
        generator = torch.Generator(self.device).manual_seed(1234)
        return torch.randn(out.shape, generator=generator, device=self.device).to(DTYPES[self.dtype]).to(out.dtype)


@torch.no_grad()
def _without_gradients(function: Function, inputs: tuple) -> Any:
    return function(*inputs)


def _leaf(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _leaves(inputs: Sequence[Any]) -> list[Tensor]:
    return [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]


def work(direction: str, forward: float, backward: float) -> float:
    """What the direction takes, of what forward and backward take."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]


def element_size(dtype: str) -> int:
    """Bytes of an element."""
    return DTYPES[dtype].itemsize


def normal(generator: torch.Generator, *shape: int, dtype: str, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal random numbers, rounded to the dtype."""
    x = torch.randn(shape, generator=generator, device=generator.device) * scale + shift
    return x.to(DTYPES[dtype])


def draw_seed(generator: torch.Generator) -> Tensor:
    """A seed for dropout."""
    return torch.randint(1 << 62, (1,), generator=generator, device=generator.device)
