"""What both trainings are optimised with: AdamW or LAMB, and a learning rate that rises and falls in straight lines."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

OPTIMIZERS = ("adamw", "lamb")
# BERT's own, and LAMB's: far above torch's 1e-8, which bfloat16's gradients would notice.
_EPS = 1e-6


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters for an optimizer: weights decay; biases and norms, all that has one axis, do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(name: str, model: nn.Module, learning_rate: float, weight_decay: float = 0.01) -> Optimizer:
    """AdamW ("adamw": Loshchilov and Hutter 2019, fused) or LAMB ("lamb") over the model's trained parameters."""
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return AdamW(groups, learning_rate, eps=_EPS, fused=True)
    if name == "lamb":
        return Lamb(groups, learning_rate, eps=_EPS)
    raise ValueError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")


def linear_schedule(optimizer: Optimizer, warmup: int, steps: int) -> LambdaLR:
    """The learning rate rises from 1 / warmup of itself to all of it, and falls to 1 / (steps - warmup) of it.

    Neither the first of the `steps` nor the last has a learning rate of 0, so that none is wasted. Call its `step()`
    after the optimizer's. Raises ValueError unless 0 <= warmup <= steps.
    """
    if not 0 <= warmup <= steps:
        raise ValueError(f"the warm-up must lie between 0 and all {steps} steps, not be {warmup}")

    def share(done: int) -> float:
        return (done + 1) / warmup if done < warmup else max(steps - done, 0) / max(steps - warmup, 1)

    return LambdaLR(optimizer, share)


class Lamb(Optimizer):
    """x <- x - lr r u, where u = m / (sqrt(v) + eps) + decay x and r = |x| / |u|, for each tensor of parameters x.

    m and v are Adam's moving averages of the gradient and its square, corrected for their start at zero. The ratio r
    is 1 where one of the norms is 0 and, as in the authors' code, where there is no decay: biases and norms.

    Source: You et al. 2020, Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = _EPS,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the closure, where given, computes the loss and the gradients anew. Returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(p) for p in params]
        steps = [state["step"] for state in states]
        m, v = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        grads, (beta1, beta2) = [p.grad for p in params], group["betas"]
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        root = torch._foreach_div(v, [1 - beta2**n for n in steps])
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, group["eps"])
        update = torch._foreach_div(m, [1 - beta1**n for n in steps])
        torch._foreach_div_(update, root)
        if group["weight_decay"]:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
            norms = zip(torch._foreach_norm(params), torch._foreach_norm(update), strict=True)
            torch._foreach_mul_(update, [torch.where((x > 0) & (u > 0), x / u, 1.0) for x, u in norms])
        torch._foreach_add_(params, update, alpha=-group["lr"])

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """The moving averages of a parameter and the number of its updates, this one counted."""
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] = state.get("step", 0) + 1
        return state
