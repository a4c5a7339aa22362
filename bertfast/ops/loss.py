"""masked_lm_loss: the decoder's GEMM and the cross entropy of masked language modelling, on labelled tokens only.

Logits of all tokens would be the largest tensor of a training step by far: 500 MB for 32 sequences of 128 tokens and
BERT's vocabulary, three times over in the backward. Here they exist for labelled tokens, some rows at a time, and the
backward makes them anew from one number a row. The GEMMs are the library's; what is left passes over 15 % of the tokens
and is 1 % of a training step, so there is one implementation for every backend, PyTorch's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bertfast import backend
from bertfast.ops import gemm, registry

IGNORED = -100  # the label of a token that no word is asked for, as in transformers
REDUCTIONS = ("mean", "sum")
# Elements of the logits that exist at once: 64 MB of float32, about 550 rows of BERT's vocabulary. Fewer rows make
# the GEMMs slower.
_MOST_LOGITS = 1 << 24


class MaskedLMLoss(NamedTuple):
    """loss: a scalar. labelled: how many tokens had a label. correct: for how many it scored highest."""

    loss: Tensor
    labelled: Tensor
    correct: Tensor


def masked_lm_loss(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None, *, reduction: str = "mean"
) -> MaskedLMLoss:
    """- sum over labelled t of log softmax(x_t W^T + b)[label_t], divided by their number where reduction is "mean".

    Args:
        x: (tokens, hidden), what goes into the decoder.
        labels: (tokens,) int64, -100 where there is none.
        weight: (vocabulary, hidden) of x's dtype, the decoder's.
        bias: (vocabulary,), or None.
        reduction: "mean", which is nan where nothing is labelled, as in transformers, or "sum".

    Returns the loss in float32 (float64 for float64), and two int64 counts. Under autocast the GEMMs have its dtype and
    the softmax float32. Waits for the device once. Raises ValueError / TypeError where shapes, dtypes or devices do not
    fit, and ValueError for a label that is no word.
    """
    registry.check_axes("x", x, "tokens", "hidden")
    registry.check_axes("weight", weight, "vocabulary", "hidden")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    registry.check_tensor("labels", labels)
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise TypeError(
            f"labels must be ({x.shape[0]},) int64, one a token, not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.device != x.device:
        raise ValueError(f"labels are on {labels.device} where x is on {x.device}: move one of them with .to()")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    fitting = {"weight": (weight, (weight.shape[0], x.shape[1]))}
    registry.check_like(x, **fitting if bias is None else fitting | {"bias": (bias, weight.shape[:1])})
    run = _op if registry.seen(x, weight, bias) else _run
    total, labelled, correct, _ = run(x, labels, weight, bias)
    return MaskedLMLoss(total / labelled if reduction == "mean" else total, labelled, correct)


def _labelled_rows(labels: Tensor, words: int) -> Tensor:
    """(labelled,) int64, the tokens that have a label. ValueError where one is no word."""
    valid = labels != IGNORED
    strange = (valid & ((labels < 0) | (labels >= words))).sum()
    count, wrong = torch.stack((valid.sum(), strange)).tolist()
    if wrong:
        raise ValueError(f"{wrong} labels are neither {IGNORED} nor a word of the vocabulary, 0 to {words - 1}")
    return torch.nonzero_static(valid, size=count).flatten()


def _chunks(rows: Tensor, words: int) -> tuple[Tensor, ...]:
    """The rows in parts of about equal size, whose logits are few enough."""
    most = max(_MOST_LOGITS // max(words, 1), 1)
    return rows.tensor_split(-(-len(rows) // most)) if len(rows) else ()


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(rows, vocabulary), in the statistics' dtype."""
    return gemm.product(x, weight, bias).to(_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(x, labels, weight, bias):
    words = weight.shape[0]
    rows = _labelled_rows(labels, words)
    lse = x.new_zeros(x.shape[0], dtype=_wide(x))
    total, correct = lse.new_zeros(()), labels.new_zeros(())
    for part in _chunks(rows, words):
        logits = _logits(x.index_select(0, part), weight, bias)
        right = logits.gather(1, labels.index_select(0, part)[:, None])[:, 0]
        highest = logits.amax(1)
        sums = logits.sub_(highest[:, None]).exp_().sum(1).log_().add_(highest)
        lse.index_copy_(0, part, sums)
        total += (sums - right).sum()
        correct += (right == highest).sum()
    return total, labels.new_full((), len(rows)), correct, lse


def _backward(dloss, x, labels, weight, bias, lse):
    words, wide = weight.shape[0], _wide(x)
    dx, dweight = torch.zeros_like(x), None
    dbias = x.new_zeros(0 if bias is None else words, dtype=wide)
    for part in _chunks(torch.nonzero(labels != IGNORED).flatten(), words):
        inputs = x.index_select(0, part)
        # (softmax - one_hot) dloss, in the logits' own memory
        dlogits = _logits(inputs, weight, bias).sub_(lse.index_select(0, part)[:, None]).exp_()
        dlogits[torch.arange(len(part), device=x.device), labels.index_select(0, part)] -= 1.0
        dlogits.mul_(dloss)
        if bias is not None:
            dbias += dlogits.sum(0)
        dlogits = dlogits.to(x.dtype)
        dx.index_copy_(0, part, gemm.gradient_of_input(dlogits, weight))
        found = gemm.gradient_of_weight(dlogits, inputs)
        dweight = found if dweight is None else dweight.to(wide).add_(found)
    dweight = torch.zeros_like(weight) if dweight is None else dweight.to(weight.dtype)
    return dx, dweight, dbias.to(x.dtype)


for _name in backend.BACKENDS:
    backend.register("masked_lm_loss", _name, (_forward, _backward))


def _run(x, labels, weight, bias):
    forward, _ = backend.implementation("masked_lm_loss", x)
    return forward(x, labels, weight, bias)


def _run_backward(dloss, x, labels, weight, bias, lse):
    _, backward = backend.implementation("masked_lm_loss", x)
    return backward(dloss, x, labels, weight, bias, lse)


def _fake(x, labels, weight, bias):
    lse = x.new_empty(x.shape[0], dtype=_wide(x))
    return lse.new_empty(()), labels.new_empty(()), labels.new_empty(()), lse


def _fake_backward(dloss, x, labels, weight, bias, lse):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(0 if bias is None else bias.shape)


def _setup_context(ctx, inputs, output):
    *_, lse = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, lse)


def _autograd(ctx, dloss, dlabelled, dcorrect, dlse):
    x, labels, weight, bias, lse = ctx.saved_tensors
    dx, dweight, dbias = _op_backward(dloss, x, labels, weight, bias, lse)
    return dx, None, dweight, None if bias is None else dbias


_op_backward = registry.define(
    "masked_lm_loss_backward(Tensor dloss, Tensor x, Tensor labels, Tensor weight, Tensor? bias, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_op = registry.define(
    "masked_lm_loss(Tensor x, Tensor labels, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _autograd,
)
