"""How far each backend is off on a case, against the specification in float64."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.case import FORWARD, Case
from bertfast import backend
from bertfast.errors import BackendError


def check(case: Case, names: Sequence[str], inputs: tuple) -> dict[str, dict[str, Any]]:
    """How far each backend is off, as shares of the largest value, and whether that is within the tests' tolerance.

    In half precision: twice the largest error of plain PyTorch in the same dtype (three times where there are
    gradients), plus two units in the last place. float32: 1e-5, times the square root of the rows for gradients.
    """
    rows = 1 if case.direction == FORWARD else max(inputs[0].shape[0], 1)
    wide = torch.float64 if inputs[0].numel() < 1 << 28 else torch.float32
    gold_inputs = [_widened(t, wide) for t in inputs]
    gold = case.results(case.gold, tuple(gold_inputs))
    plain = case.results(case.plain, inputs)
    factor = 2.0 if case.direction == FORWARD else 3.0
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            with backend.use(name):
                actual = case.results(case.ours, inputs)
        except BackendError as error:
            found[name] = {"refused": str(error)[:300]}
            continue
        except Exception as error:
            found[name] = {"accurate": False, "error": f"{type(error).__name__}: {error}"[:400]}
            if case.device == "cuda":
                torch.cuda.synchronize()  # raises where this process is lost
            continue
        worst = {"accurate": True, "finite": True, "error": 0.0, "plain_error": 0.0}
        for ours, theirs, right in zip(actual, plain, gold, strict=True):
            scale = max(_largest(right), 1e-6)
            error, plain_error = _largest(ours - right) / scale, _largest(theirs - right) / scale
            limit = factor * plain_error + 2 * torch.finfo(ours.dtype).eps
            if case.dtype == "float32":
                limit = max(limit, 1e-5 * rows**0.5)
            worst["finite"] &= bool(torch.isfinite(ours).all())
            worst["accurate"] &= worst["finite"] and error <= limit
            worst["error"] = max(worst["error"], error)
            worst["plain_error"] = max(worst["plain_error"], plain_error)
        found[name] = worst
    return found


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def _largest(x: Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    return torch.linalg.vector_norm(x, torch.inf).item() if x.numel() else 0.0
