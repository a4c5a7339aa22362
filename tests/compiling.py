"""The fixture that compiles an op and insists on one graph for all lengths."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

LENGTHS = (24, 40, 7, 64)


@pytest.fixture
def compiles_once() -> Callable[..., None]:
    """check(make_inputs, op): op compiles with fullgraph, for any number of rows, without compiling again, and exports.

    make_inputs(rows) gives op's arguments. Floating-point ones get gradients, which have to be those of eager mode.
    """

    def check(make_inputs: Callable[[int], Sequence[Tensor]], op: Callable[..., Tensor]) -> None:
        torch._dynamo.reset()
        graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=graphs)
        for rows in LENGTHS:
            inputs = make_inputs(rows)
            with torch.no_grad():
                torch.testing.assert_close(compiled(*inputs), op(*inputs))
            if rows == LENGTHS[0]:
                first = graphs.frame_count
        assert graphs.frame_count == first
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in make_inputs(LENGTHS[0])]
        wanted = [t for t in leaves if t.requires_grad]
        ours = torch.autograd.grad(compiled(*leaves).square().sum(), wanted)
        eager = torch.autograd.grad(op(*leaves).square().sum(), wanted)
        torch.testing.assert_close(ours, eager)
        torch._dynamo.reset()

        class Module(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Tensor:
                return op(*tensors)

        inputs = tuple(make_inputs(LENGTHS[0]))
        exported = torch.export.export(Module(), inputs)
        torch.testing.assert_close(exported.module()(*inputs), op(*inputs))

    return check
