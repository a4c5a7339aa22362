"""masked_lm_loss against the full cross entropy in float64."""

import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from bertfast import reference
from bertfast.ops import loss as module
from bertfast.ops import masked_lm_loss

# (tokens, hidden, vocabulary)
SHAPES = [(1, 1, 2), (7, 16, 11), (64, 24, 131), (130, 33, 1000)]
DTYPES = [torch.float32, torch.bfloat16]


def make_inputs(tokens, hidden, words, dtype):
    x = torch.randn(tokens, hidden, dtype=dtype)
    return [x, torch.randn(words, hidden, dtype=dtype) / hidden**0.5, torch.randn(words, dtype=dtype)]


def make_labels(tokens, words, share=0.3):
    labels = torch.randint(words, (tokens,))
    labels = labels.masked_fill(torch.rand(tokens) >= share, -100)
    labels[0] = words - 1  # never none at all
    return labels


@pytest.fixture(params=["one part", "several parts"])
def parts(request, monkeypatch):
    """Logits in one part, and in parts of a few rows."""
    if request.param == "several parts":
        monkeypatch.setattr(module, "_MOST_LOGITS", 2100)


def check_parity(shape, dtype, reduction, with_bias=True, share=0.3, device="cpu"):
    labels = make_labels(shape[0], shape[2], share).to(device)
    labelled = int((labels != -100).sum())
    factor = 1 / labelled if reduction == "mean" else 1.0
    tensors = [t.to(device) for t in make_inputs(*shape, dtype)]
    names = ("x", "weight", "bias")
    if not with_bias:
        tensors, names = tensors[:2], names[:2]

    def plain(x, weight, bias=None):
        return F.cross_entropy(F.linear(x, weight, bias).float(), labels, reduction=reduction)[None].to(x.dtype)

    parity.check_gradients(
        lambda x, weight, bias=None: (
            masked_lm_loss(x, labels, weight, bias, reduction=reduction).loss[None].to(x.dtype)
        ),
        lambda x, weight, bias=None: (reference.masked_lm_loss(x, labels, weight, bias) * factor)[None],
        plain,
        tensors,
        names,
        rows=labelled,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_in_both_directions(parts, shape, reduction, dtype):
    check_parity(shape, dtype, reduction)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_label_and_labels_everywhere(parts, share):
    check_parity((130, 33, 1000), torch.float32, "mean", share=share)


def test_without_a_bias(parts):
    check_parity((64, 24, 131), torch.float32, "mean", with_bias=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 768, 30522)])
def test_parity_on_the_gpu(shape, dtype):
    check_parity(shape, dtype, "mean", device="cuda")


def test_exact_in_float64(parts):
    """The same loss and gradients as the full computation, to the last digits."""
    tensors = [t.requires_grad_() for t in make_inputs(40, 16, 90, torch.float64)]
    x, weight, bias = tensors
    labels = make_labels(40, 90)
    full = F.cross_entropy(x @ weight.t() + bias, labels)
    ours = masked_lm_loss(x, labels, weight, bias).loss
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, full, rtol=1e-13, atol=0)
    wanted = torch.autograd.grad(full, tensors)
    for a, b in zip(torch.autograd.grad(ours, tensors), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_gradcheck():
    x, weight, bias = (t.requires_grad_() for t in make_inputs(6, 4, 9, torch.float64))
    labels = make_labels(6, 9)
    assert torch.autograd.gradcheck(lambda *t: masked_lm_loss(t[0], labels, *t[1:]).loss, (x, weight, bias))


@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias):
    x, weight, bias = (t.requires_grad_() for t in make_inputs(6, 4, 9, torch.float32))
    opcheck(torch.ops.bertfast.masked_lm_loss.default, (x, make_labels(6, 9), weight, bias if with_bias else None))


def test_counts():
    """Of four rows three are labelled, and two of those have the highest score at their label."""
    x, weight = torch.eye(4), torch.eye(4)
    labels = torch.tensor([0, -100, 2, 0])
    out = masked_lm_loss(x, labels, weight)
    assert (out.labelled.item(), out.correct.item()) == (3, 2)
    assert out.labelled.dtype == out.correct.dtype == torch.int64


def test_nothing_labelled_is_nan_as_in_transformers_and_has_no_gradient():
    x, weight, bias = (t.requires_grad_() for t in make_inputs(5, 4, 9, torch.float32))
    labels = torch.full((5,), -100)
    assert masked_lm_loss(x, labels, weight, bias).loss.isnan()
    out = masked_lm_loss(x, labels, weight, bias, reduction="sum")
    out.loss.backward()
    assert out.loss == 0 and all((t.grad == 0).all() for t in (x, weight, bias))


def test_scores_of_any_size():
    """Scores that overflow exp by themselves, and a row whose scores are far below the others'."""
    x = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[3e4], [-3e4], [0.0]], requires_grad=True)
    loss = masked_lm_loss(x, torch.tensor([0, 0]), weight, reduction="sum").loss
    loss.backward()
    assert loss == 6e4 and x.grad.isfinite().all() and weight.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_never_all_tokens_times_the_vocabulary(monkeypatch):
    """The largest tensor that a forward and a backward make is logits of labelled rows, or of a part of them."""
    words = 4096
    x, weight, bias = make_inputs(512, 8, words, torch.float32)
    labels = make_labels(512, words, share=0.1)
    labelled = int((labels != -100).sum())
    for most, rows in ((1 << 24, labelled), (20 * words, 20)):
        monkeypatch.setattr(module, "_MOST_LOGITS", most)
        with Largest() as largest:
            *_, lse = module._forward(x, labels, weight, bias)
            module._backward(torch.ones(()), x, labels, weight, bias, lse)
        assert rows / 2 < largest.elements / words <= rows


def test_autocast():
    """GEMMs in bfloat16, the softmax and the loss in float32, gradients in the parameters' dtype."""
    x, weight, bias = (t.requires_grad_() for t in make_inputs(64, 24, 131, torch.float32))
    labels = make_labels(64, 131)
    with torch.autocast("cpu", torch.bfloat16):
        ours = masked_lm_loss(x, labels, weight, bias).loss
        stock = F.cross_entropy(F.linear(x, weight, bias), labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
    ours.backward()
    assert weight.grad.dtype == torch.float32


def test_compiles_without_a_break():
    x, weight, bias = make_inputs(64, 24, 131, torch.float32)
    labels = make_labels(64, 131)
    compiled = torch.compile(lambda *t: masked_lm_loss(*t).loss, fullgraph=True, backend="aot_eager")
    w = weight.clone().requires_grad_()
    compiled(x, labels, w, bias).backward()
    v = weight.clone().requires_grad_()
    masked_lm_loss(x, labels, v, bias).loss.backward()
    torch.testing.assert_close(w.grad, v.grad)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, TypeError, "one a token"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, TypeError, "int64"),
        ({"labels": torch.tensor([0, 1, 2, 9])}, ValueError, "1 labels are neither -100 nor a word"),
        ({"labels": torch.tensor([0, 1, -1, -7])}, ValueError, "2 labels"),
        ({"labels": None}, TypeError, "labels must be"),
        ({"weight": torch.zeros(9, 5)}, ValueError, "weight has shape"),
        ({"weight": torch.zeros(9, 3, dtype=torch.float64)}, TypeError, "weight is torch.float64"),
        ({"bias": torch.zeros(8)}, ValueError, "bias has shape"),
        ({"x": torch.zeros(2, 2, 3)}, ValueError, "x must be"),
        ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum"),
    ],
)
def test_bad_input(changes, error, words):
    arguments = {
        "x": torch.zeros(4, 3),
        "labels": torch.tensor([0, 1, -100, 8]),
        "weight": torch.zeros(9, 3),
        "bias": torch.zeros(9),
    }
    masked_lm_loss(**arguments)
    with pytest.raises(error, match=words):
        masked_lm_loss(**(arguments | changes))
