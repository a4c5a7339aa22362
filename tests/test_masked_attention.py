"""masked_attention against the reference in float64."""

import math

import implementations
import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bertfast import backend, reference
from bertfast.ops import masked_attention


@pytest.fixture(params=["reference", "triton"])
def masked(request):
    """Runs the test on each implementation that there is."""
    yield from implementations.force(request.param)


def make(batch, heads, queries, keys, size, dtype):
    return [torch.randn(batch, heads, n, size).to(dtype) for n in (queries, keys, keys)]


def boolean(*shape):
    """Some keys for each query, and one query of the first rectangle that sees none."""
    mask = torch.rand(*shape) > 0.4
    mask[..., 0] = True
    (mask if mask.dim() == 2 else mask[0])[..., -1, :] = False
    return mask


def plain(mask):
    """PyTorch's own, with zeros for queries that see nothing."""

    def attend(q, k, v):
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v)
        added = torch.where(mask, 0.0, -math.inf).to(q.dtype) if mask.dtype == torch.bool else mask.to(q.dtype)
        added = added.expand(*q.shape[:3], k.shape[2])
        empty = (added == -math.inf).all(-1, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v, added.masked_fill(empty, 0)).masked_fill(empty, 0)

    return attend


def check(mask, batch, heads, queries, keys, size, dtype):
    parity.check_gradients(
        lambda q, k, v: masked_attention(q, k, v, mask),
        lambda q, k, v: reference.masked_attention(q, k, v, mask),
        plain(mask),
        make(batch, heads, queries, keys, size, dtype),
        ("q", "k", "v"),
        rows=queries,
    )


@pytest.mark.parametrize(
    ("queries", "keys", "size", "dtype"),
    [
        (1, 1, 32, torch.float32),
        (33, 20, 64, torch.float32),
        (64, 128, 64, torch.bfloat16),
        (5, 130, 128, torch.bfloat16),
    ],
)
def test_parity_without_a_mask(masked, queries, keys, size, dtype):
    check(None, 2, 2, queries, keys, size, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 37, 70), (2, 1, 1, 70), (3, 37, 70), (37, 1)], ids=str)
def test_parity_with_a_boolean_mask(masked, shape, dtype):
    check(boolean(*shape), 2, 3, 37, 70, 32, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 2, 20, 65), (1, 1, 20, 65), (2, 1, 1, 65)], ids=str)
def test_parity_with_an_additive_mask(masked, shape, dtype):
    mask = torch.randn(shape).to(dtype)
    mask[..., 5:9] = -math.inf
    mask[:1, ..., -1, :] = -math.inf
    check(mask, 2, 2, 20, 65, 32, dtype)


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min, -1e31])
def test_a_query_that_sees_no_key_gives_zeros(masked, value):
    q, k, v = (t.requires_grad_() for t in make(1, 2, 6, 9, 32, torch.float32))
    mask = torch.zeros(6, 9)
    mask[2] = value
    for each in (mask, mask == 0):
        out = masked_attention(q, k, v, each, scale=-0.3)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert (out[:, :, 2] == 0).all() and (gradients[0][:, :, 2] == 0).all()
        assert out.isfinite().all() and all(g.isfinite().all() and g.any() for g in gradients)


def test_masked_keys_do_not_show(masked):
    q, k, v = make(2, 2, 10, 40, 32, torch.float32)
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[..., 20:] = False
    other = [torch.cat((t[:, :, :20], torch.randn(2, 2, 20, 32)), dim=2) for t in (k, v)]
    assert torch.equal(masked_attention(q, k, v, mask), masked_attention(q, *other, mask))


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_parity_in_both_directions(masked, p):
    mask, seed = boolean(2, 1, 20, 90), torch.tensor([-7])
    parity.check_gradients(
        lambda *qkv: masked_attention(*qkv, mask, scale=0.3, dropout_p=p, seed=seed),
        lambda *qkv: reference.masked_attention(*qkv, mask, 0.3, p, seed),
        plain(mask),
        make(2, 2, 20, 90, 32, torch.float32),
        ("q", "k", "v"),
        rows=20,
    )


def test_dropout_is_that_of_packed_sequences(masked):
    qkv, seed = torch.randn(2, 3, 2, 70, 32), torch.tensor([5])
    out = masked_attention(*qkv.unbind(1), dropout_p=0.3, seed=seed)
    packed, borders = qkv.permute(0, 3, 1, 2, 4).flatten(0, 1), torch.tensor([0, 70, 140], dtype=torch.int32)
    wanted = reference.varlen_attention(packed, borders, None, 0.3, seed).unflatten(0, (2, 70)).transpose(1, 2)
    torch.testing.assert_close(out, wanted)


def test_strided_views(masked):
    # As a model makes them: (batch, length, heads, size), turned; and a last axis with gaps.
    turned = [torch.randn(2, n, 3, 32).transpose(1, 2) for n in (11, 40, 40)]
    gaps = [torch.randn(2, 3, n, 64)[..., ::2] for n in (11, 40, 40)]
    mask = boolean(2, 1, 40, 11).transpose(2, 3)
    for views in (turned, gaps):
        out = masked_attention(*views, mask)
        assert out.is_contiguous()
        torch.testing.assert_close(out, masked_attention(*(t.contiguous() for t in views), mask.contiguous()))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_at_all(masked, batch, queries, keys):
    q, k, v = (t.requires_grad_() for t in make(batch, 2, queries, keys, 32, torch.float32))
    out = masked_attention(q, k, v)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and not out.any() and not any(g.any() for g in gradients)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("mask", [None, torch.ones(1, 7, dtype=torch.bool)])
def test_opcheck(masked, mask, p):
    q, k, v = make(1, 2, 5, 7, 16, torch.float32)
    seed = torch.tensor([5]) if p else None
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    opcheck(torch.ops.bertfast.masked_attention, (*leaves, mask, 0.3, p, seed))
    out, lse = torch.ops.bertfast.masked_attention(q, k, v, mask, 0.3, p, seed)
    opcheck(
        torch.ops.bertfast.masked_attention_backward, (torch.randn_like(out), q, k, v, mask, out, lse, 0.3, p, seed)
    )


def test_gradients_of_the_reference():
    q, k, v = (t.requires_grad_() for t in make(2, 2, 4, 5, 3, torch.float64))
    mask, seed = boolean(2, 1, 4, 5), torch.tensor([1])
    for each in (mask, torch.where(mask, torch.randn(2, 1, 4, 5).double(), -math.inf)):
        arguments = each, None, 0.3, seed
        assert torch.autograd.gradcheck(lambda *qkv: reference.masked_attention(*qkv, *arguments), (q, k, v))  # noqa: B023
        out = reference.masked_attention(q, k, v, *arguments)
        dout = torch.randn_like(out)
        spelled_out = reference.masked_attention_backward(dout, q.detach(), k.detach(), v.detach(), *arguments)
        torch.testing.assert_close(spelled_out, list(torch.autograd.grad(out, (q, k, v), dout)))


def test_the_reference_is_torch_s_own():
    q, k, v = make(2, 3, 9, 12, 16, torch.float64)
    mask = boolean(2, 3, 9, 12)
    torch.testing.assert_close(reference.masked_attention(q, k, v, mask), plain(mask)(q, k, v))


def test_bad_input():
    q, k, v = make(2, 3, 4, 5, 8, torch.float32)
    with pytest.raises(ValueError, match="batch, heads, queries, head_size"):
        masked_attention(q[0], k, v)
    with pytest.raises(ValueError, match="v has shape"):
        masked_attention(q, k, v[:, :, :4])
    with pytest.raises(TypeError, match="k is"):
        masked_attention(q, k.half(), v)
    with pytest.raises(ValueError, match="does not broadcast"):
        masked_attention(q, k, v, torch.ones(2, 1, 1, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="boolean, or floating-point"):
        masked_attention(q, k, v, torch.ones(4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="wants a gradient"):
        masked_attention(q, k, v, torch.zeros(4, 5, requires_grad=True))
    with pytest.raises(ValueError, match="dropout_p"):
        masked_attention(q, k, v, dropout_p=1.0)


def test_a_backward_on_another_backend_than_the_forward(triton_device):
    q, k, v = (torch.randn(2, 2, 9, 32, device=triton_device) for _ in range(3))
    mask = torch.rand(2, 1, 9, 9, device=triton_device) < 0.7
    mask[0, 0, 3] = False
    dout, gold = torch.randn_like(q), reference.masked_attention_backward
    with backend.use("reference"):
        out, lse = torch.ops.bertfast.masked_attention(q, k, v, mask, 0.3, 0.0, None)
    mixed = torch.ops.bertfast.masked_attention_backward(dout, q, k, v, mask, out, lse, 0.3, 0.0, None)
    for ours, theirs in zip(mixed, gold(dout, q, k, v, mask, 0.3), strict=True):
        torch.testing.assert_close(ours, theirs)
