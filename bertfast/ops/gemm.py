"""The GEMMs of a linear layer without packed weights, and of its gradients, in the library that is fastest at them.

PyTorch hands float32 on a CPU to MKL, which runs AMD's processors at half the rate of oneDNN: 200 against 400 GFLOP/s
at BERT's shapes on two Zen 5 cores (benchmarks/NOTES.md). oneDNN is in PyTorch too, under a name of its own. In
bfloat16 PyTorch takes it by itself.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast import backend
from bertfast.layout import adjacent

linear_pointwise = torch.ops.mkldnn._linear_pointwise.default
# From so many rows on a wide gradient of a weight is computed transposed and turned, a quarter faster in all.
_TURNED_FROM = 768


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors below one another: a view where they lie so, a copy otherwise, None where there are none."""
    if not tensors:
        return None
    found = adjacent(tensors)
    return torch.cat(list(tensors)) if found is None else found


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x: (T, K), weight: (N, K), bias: (N,). Returns (T, N)."""
    if _on_onednn(x, weight):
        return linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def gradient_of_input(dout: Tensor, weight: Tensor) -> Tensor:
    """dout W. dout: (T, N), weight: (N, K). Returns (T, K)."""
    return linear_pointwise(dout, weight.t(), None, "none", [], "") if _on_onednn(dout, weight) else dout @ weight


def gradient_of_weight(dout: Tensor, x: Tensor) -> Tensor:
    """dout^T x. dout: (T, N), x: (T, K). Returns (N, K), dense."""
    if not _on_onednn(dout, x):
        return dout.t() @ x
    if dout.shape[1] > x.shape[1] and dout.shape[0] >= _TURNED_FROM:
        return linear_pointwise(x.t(), dout.t(), None, "none", [], "").t().contiguous()
    return linear_pointwise(dout.t(), x.t(), None, "none", [], "")


def _on_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.numel() > 0
        and b.numel() > 0
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and backend.current() != "reference"
    )
