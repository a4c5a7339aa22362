"""The tolerance policy: how far an implementation may stray from the reference in higher precision.

The oracle is `bertfast.reference` in float64 on the same rounded inputs. float32 has to be within 1e-5 of the
largest reference value (times the square root of the rows for a gradient summed over rows: rounding errors add up
like a random walk). Half precision is compared with what plain PyTorch in that dtype gets wrong, the `baseline`: at
most twice its largest error (three times in a backward) plus two units in the last place of the largest value, and
1.25 times its mean error.
"""

from collections.abc import Callable, Sequence

import cuda_host
import torch
from torch import Tensor


def check(
    actual: Tensor,
    gold: Tensor,
    baseline: Tensor | None = None,
    *,
    factor: float = 2.0,
    mean_factor: float = 1.25,
    rows: int = 1,
    name: str = "",
) -> None:
    """Assert that `actual` agrees with the float64 `gold` by the policy."""
    assert gold.dtype == torch.float64 and actual.shape == gold.shape, name
    if gold.numel() == 0:
        return
    error = (actual.double() - gold).abs()
    largest = gold.abs().max().item()
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if actual.dtype == torch.float32:
        limit = 1e-5 * max(largest, 0.1) * rows**0.5  # a lone value near 0 is no scale
        assert error.max() <= limit, f"{name}: off by {error.max():.3g}, limit {limit:.3g}"
        return
    assert baseline is not None and baseline.dtype == actual.dtype, name
    theirs = (baseline.double() - gold).abs()
    limit = factor * theirs.max().item() + 2 * torch.finfo(actual.dtype).eps * largest
    assert error.max() <= limit, f"{name}: off by {error.max():.3g}, limit {limit:.3g}"
    mean_limit = mean_factor * theirs.mean().item() + torch.finfo(actual.dtype).eps * largest / 8
    assert error.mean() <= mean_limit, f"{name}: off by {error.mean():.3g} on average, limit {mean_limit:.3g}"


def check_gradients(
    op: Callable[..., Tensor],
    gold_op: Callable[..., Tensor],
    baseline_op: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    names: Sequence[str],
    *,
    rows: int = 1,
) -> None:
    """Check op(*inputs) and its gradients for every input against gold_op in float64; baseline_op is plain PyTorch.

    A gradient of a vector or of a table is a sum over `rows` rows.
    """

    def run(function: Callable[..., Tensor], tensors: Sequence[Tensor], dout: Tensor | None) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        dout = torch.ones_like(out) if dout is None else dout.to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    with torch.no_grad():
        shape = op(*inputs)
    dout = torch.randn_like(shape)
    actual = run(op, inputs, dout)
    gold = run(gold_op, [t.double() for t in inputs], dout)
    half = actual[0].dtype != torch.float32
    baseline = run(baseline_op, inputs, dout) if half else [None] * len(gold)
    for name, a, g, b in zip(("out", *names), actual, gold, baseline, strict=True):
        assert a.dtype == inputs[0].dtype, name
        summed = rows if name not in ("out", "x", "residual", "qkv") else 1
        check(a, g, b, factor=2.0 if name == "out" else 3.0, rows=summed, name=name)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values at an address that is a multiple of their size and of nothing more."""
    shifted = torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view_as(tensor)
    assert shifted.data_ptr() % 16
    return shifted


def check_schedules(run: Callable[[], Sequence[Tensor]]) -> None:
    """Assert that run() gives the same bits in whatever order the emulated GPU takes threads, warps and blocks."""
    results = []
    for seed in range(4):
        with cuda_host.shuffled(seed):
            results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def check_threads(run: Callable[[], Sequence[Tensor]]) -> None:
    """Assert that run() gives the same bits on one thread, on two, and on two once more."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
