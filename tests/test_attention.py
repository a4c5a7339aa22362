"""varlen_attention against the reference in float64."""

import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bertfast import reference
from bertfast.ops import varlen_attention

CUDA_ON_THE_HOST = False  # half precision, short sequences, forward: test_cuda_attention.py
DTYPES = [torch.float32, torch.bfloat16]
# None, one, and both sides of every block edge, mixed in one batch so that a leak between neighbours shows.
LENGTHS = [[7], [0, 1, 2, 0], [15, 16, 17, 31], [33, 32, 1, 63, 64, 65], [127, 128, 129, 3], [200, 0, 511], [513, 5]]


def borders(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_qkv(lengths, heads, size, dtype):
    return torch.randn(sum(lengths), 3, heads, size, dtype=dtype)


def plain(qkv, cu_seqlens, p=0.0, seed=None, scale=None):
    """PyTorch's own, sequence by sequence."""
    if p:
        return reference.varlen_attention(qkv, cu_seqlens, None, p, seed)
    out = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)[:, None]
        out.append(F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("size", [32, 64])
def test_parity_in_both_directions(implementation, lengths, size, dtype):
    cu_seqlens = borders(lengths)
    parity.check_gradients(
        lambda qkv: varlen_attention(qkv, cu_seqlens),
        lambda qkv: reference.varlen_attention(qkv, cu_seqlens),
        lambda qkv: plain(qkv, cu_seqlens),
        [make_qkv(lengths, 1 if implementation == "triton" and sum(lengths) > 500 else 2, size, dtype)],  # it is slow
        ("qkv",),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 8, 24, 37, 80, 128])
def test_other_head_sizes(implementation, size, dtype):
    cu_seqlens = borders([5, 40, 17])
    parity.check_gradients(
        lambda qkv: varlen_attention(qkv, cu_seqlens, scale=0.3),
        lambda qkv: reference.varlen_attention(qkv, cu_seqlens, 0.3),
        lambda qkv: plain(qkv, cu_seqlens, scale=0.3),
        [make_qkv([62], 3, size, dtype)],
        ("qkv",),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_parity_in_both_directions(implementation, p, dtype):
    cu_seqlens, seed = borders([33, 0, 5, 70]), torch.tensor([-(2**40) - 11])
    parity.check_gradients(
        lambda qkv: varlen_attention(qkv, cu_seqlens, dropout_p=p, seed=seed),
        lambda qkv: reference.varlen_attention(qkv, cu_seqlens, None, p, seed),
        lambda qkv: plain(qkv, cu_seqlens, p, seed),
        [make_qkv([108], 2, 32, dtype)],
        ("qkv",),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_is_alone_in_any_batch(native_implementation, dtype):
    lengths = [40, 129, 7]
    qkv = make_qkv(lengths, 2, 64, dtype)
    together = varlen_attention(qkv, borders(lengths)).split(lengths)
    for part, out in zip(qkv.split(lengths), together, strict=True):
        assert torch.equal(varlen_attention(part, borders([len(part)])), out)


def test_large_scores(native_implementation):
    qkv = make_qkv([50], 2, 32, torch.float32) * 40  # scores in the thousands: exp without the maximum overflows
    out, gold = varlen_attention(qkv, borders([50])), reference.varlen_attention(qkv.double(), borders([50]))
    assert out.isfinite().all() and (out - gold).abs().max() < 1e-3 * gold.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_sequence(native_implementation, dtype):
    qkv = make_qkv([9, 7, 8], 2, 32, dtype)
    qkv[[9, 15]] = float("nan")  # next to either neighbour
    before, inside, after = varlen_attention(qkv, borders([9, 7, 8])).split([9, 7, 8])
    assert before.isfinite().all() and inside.isnan().all() and after.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "of"), [(32, 64), (32, 33), (5, 7), (32, 1024)])
def test_strided_views(native_implementation, size, of, dtype):
    lengths = [5, 33]
    wide = torch.randn(38, 3, 2, of).to(dtype)
    wide[..., size:] = float("nan")
    qkv = wide[..., :size]
    assert torch.equal(varlen_attention(qkv, borders(lengths)), varlen_attention(qkv.contiguous(), borders(lengths)))
    turned = torch.randn(38, 2, 3, size).to(dtype).transpose(1, 2)
    assert torch.equal(
        varlen_attention(turned, borders(lengths)), varlen_attention(turned.contiguous(), borders(lengths))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whatever_the_threads(native_implementation, dtype):
    if native_implementation == "triton":
        pytest.skip("its interpreter has one thread")
    lengths = [300, 5, 64, 17, 0, 1]
    qkv, cu_seqlens = make_qkv(lengths, 3, 64, dtype).requires_grad_(), borders(lengths)

    def run():
        out = varlen_attention(qkv, cu_seqlens, dropout_p=0.1, seed=torch.tensor([3]))
        return [out, *torch.autograd.grad(out.square().sum(), qkv)]

    parity.check_threads(run)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck(implementation, p):
    qkv, cu_seqlens = make_qkv([11], 2, 8, torch.float32), borders([4, 7])
    seed = torch.tensor([5]) if p else None
    opcheck(torch.ops.bertfast.varlen_attention, (qkv.clone().requires_grad_(), cu_seqlens, -1, None, 0.3, p, seed))
    out, lse = torch.ops.bertfast.varlen_attention(qkv, cu_seqlens, 7, None, 0.3, p, seed)
    arguments = (torch.randn_like(out), qkv, cu_seqlens, 7, None, out, lse, 0.3, p, seed)
    opcheck(torch.ops.bertfast.varlen_attention_backward, arguments)


def test_gradients_of_the_reference():
    qkv, cu_seqlens = make_qkv([6], 2, 3, torch.float64).requires_grad_(), borders([4, 0, 2])
    arguments = cu_seqlens, None, 0.3, torch.tensor([1])
    assert torch.autograd.gradcheck(lambda t: reference.varlen_attention(t, *arguments), qkv)
    out = reference.varlen_attention(qkv, *arguments)
    dout = torch.randn_like(out)
    spelled_out = reference.varlen_attention_backward(dout, qkv.detach(), *arguments)
    torch.testing.assert_close(spelled_out, torch.autograd.grad(out, qkv, dout)[0])


def test_compiles_whole_and_once_for_all_lengths(compiles_once):
    def make(rows):
        return [make_qkv([rows, rows], 2, 16, torch.float32), borders([rows, rows])]

    compiles_once(make, varlen_attention)


@pytest.mark.parametrize("cu_seqlens", [[0, 5, 3, 8], [1, 8], [0, 9], [0, 7], [-1, 8], []], ids=str)
def test_wrong_borders(implementation, cu_seqlens):
    with pytest.raises(ValueError, match="rise from 0 to the number of tokens, 8"):
        varlen_attention(torch.zeros(8, 3, 2, 4), torch.tensor(cu_seqlens, dtype=torch.int32))


def test_bad_input():
    good = torch.zeros(8, 3, 2, 4)
    with pytest.raises(ValueError, match="tokens, 3, heads, head_size"):
        varlen_attention(good[:, :2], borders([8]))
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        varlen_attention(good, borders([8]).long())
    with pytest.raises(ValueError, match="dropout_p"):
        varlen_attention(good, borders([8]), dropout_p=-0.1)
