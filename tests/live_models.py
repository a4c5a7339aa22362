"""What tests of seams share beside `agreement`: the path of all calls, the gradients of a model's loss."""

from typing import Any

from agreement import TOLERANCE, ran
from torch import Tensor, nn

# Sums over a batch add up more rounding errors than a forward has.
GRADIENT_TOLERANCE = 10 * TOLERANCE
# float32 through two layers of large weights. A wrong scale, activation, mask or position is off by more than 1e-3.
TOLERANCE32 = 1e-4


def path_of(model: Any) -> str:
    """The one path that all calls since patching took."""
    (path,) = ran(model)
    return path


def loss_gradients(model: nn.Module, call: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients of a call's loss, of those parameters that have one."""
    model.zero_grad()
    model(**call).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
