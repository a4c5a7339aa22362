"""The CUDA kernel for short sequences, with mma.sync and with wgmma, on the emulated GPU: against the reference."""

import cuda_host
import parity
import pytest
import torch
import torch.nn.functional as F

from bertfast import backend, native, reference
from bertfast.errors import BackendError
from bertfast.ops import attention, varlen_attention

DTYPES = [torch.bfloat16, torch.float16]
# Both sides of every length at which the kernel takes other code, other warps or another tile, in one batch.
LENGTHS = [0, 1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 81, 96, 97, 112, 113, 127, 128]


@pytest.fixture(params=["mma", "wgmma"], autouse=True)
def unit(request, monkeypatch, cuda_on_the_host):
    """The matrix units that are used, and results that are NaN until they are written."""
    monkeypatch.setattr(attention, "_has_warpgroups", lambda device: request.param == "wgmma")
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def borders(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_qkv(lengths, heads, size, dtype, scale=1.0):
    return (torch.randn(sum(lengths), 3, heads, size) * scale).to(dtype)


def plain(qkv, cu_seqlens, scale=None):
    """PyTorch's own, sequence by sequence."""
    out = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)[:, None]
        out.append(F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1))
    return torch.cat(out)


def run(qkv, lengths, max_seqlen=None, order=None, scale=None, p=0.0, seed=None, save=True):
    """(out, lse)"""
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    longest = max(lengths) if max_seqlen is None else max_seqlen
    return attention._forward(qkv, borders(lengths), longest, order, scale, p, seed, save)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [(3, 64), (5, 32)])  # heads that do not fill their last block
def test_parity(heads, size, dtype):
    lengths = [LENGTHS[i] for i in torch.randperm(len(LENGTHS))]
    qkv, cu_seqlens = make_qkv(lengths, heads, size, dtype), borders(lengths)
    order = torch.tensor(lengths).argsort(descending=True).int()
    out, lse = run(qkv, lengths, order=order)
    gold = reference.varlen_attention(qkv.double(), cu_seqlens)
    parity.check(out, gold, plain(qkv, cu_seqlens), name="out")
    parity.check(lse, reference.varlen_attention_lse(qkv.double(), cu_seqlens).double(), name="lse")


@pytest.mark.parametrize("scale", [3.0, -0.4, 0.0])
def test_large_scores_and_other_scales(scale):
    # With 3.0, scores of some hundred: exp without the maximum overflows. A negative scale has wgmma give way to mma.
    lengths = [128, 50, 5]
    qkv, cu_seqlens = make_qkv(lengths, 2, 64, torch.bfloat16, 3.0), borders(lengths)
    out, lse = run(qkv, lengths, scale=scale)
    gold = reference.varlen_attention(qkv.double(), cu_seqlens, scale)
    parity.check(out, gold, plain(qkv, cu_seqlens, scale))
    lse_gold = torch.cat(
        [
            torch.logsumexp(scale * (q @ k.transpose(1, 2)), -1)
            for q, k, _ in (part.double().permute(1, 2, 0, 3) for part in qkv.split(lengths))
        ],
        dim=1,
    )
    parity.check(lse, lse_gold)


@pytest.mark.parametrize("threshold", [256, 6656, 32768, 65280])
def test_dropout_is_the_reference_s_bit_for_bit(threshold):
    # Queries of zeros give every key the same probability, and values that are rows of the identity show it as it is:
    # the first half of the keys in one run, the second half in another.
    lengths, heads, size = [128, 70, 64, 33, 17, 5], 2, 64
    seed, p = torch.tensor([-(2**40) - 11]), threshold / 65536
    halves = []
    for half in (0, 64):
        qkv = torch.zeros(sum(lengths), 3, heads, size, dtype=torch.float16)
        for part in qkv.split(lengths):
            keys = torch.arange(min(64, max(0, len(part) - half)))
            part[half + keys, 2, :, keys] = 1
        halves.append(run(qkv, lengths, p=p, seed=seed)[0])
    for b, parts in enumerate(zip(*(half.split(lengths) for half in halves), strict=True)):
        length = lengths[b]
        drawn = torch.cat(parts, dim=2)[..., :length].permute(1, 0, 2).float() * length
        wanted = reference._attention_multiplier(torch.zeros(heads, length, length), b, p, seed)
        assert torch.equal(drawn != 0, wanted != 0)
        torch.testing.assert_close(drawn, wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("size", [32, 64])
def test_dropout_parity(size):
    lengths, seed = [33, 0, 5, 128, 90, 20], torch.tensor([2**50 + 3])
    qkv, cu_seqlens = make_qkv(lengths, 3, size, torch.bfloat16), borders(lengths)
    out, lse = run(qkv, lengths, p=0.1, seed=seed)
    gold = reference.varlen_attention(qkv.double(), cu_seqlens, None, 0.1, seed)
    # The reference rounds nothing but its result; a kernel rounds the probabilities too, as PyTorch's own does.
    parity.check(out, gold, plain_with_dropout(qkv, lengths, 0.1, seed))
    parity.check(lse, reference.varlen_attention_lse(qkv.double(), cu_seqlens).double())


def plain_with_dropout(qkv, lengths, p, seed):
    """Attention in qkv's dtype throughout, as PyTorch computes it, with the reference's mask."""
    out = []
    for b, part in enumerate(qkv.split(lengths)):
        q, k, v = part.permute(1, 2, 0, 3)
        probabilities = torch.softmax(q @ k.transpose(1, 2) * qkv.shape[3] ** -0.5, dim=-1)
        multiplier = reference._attention_multiplier(probabilities.float(), b, p, seed)
        out.append(((probabilities * multiplier).to(qkv.dtype) @ v).transpose(0, 1))
    return torch.cat(out)


def test_a_sequence_is_alone_in_any_batch_and_any_schedule():
    lengths = [40, 128, 7, 90]
    qkv = make_qkv(lengths, 3, 32, torch.float16)
    alone = [run(part, [len(part)])[0] for part in qkv.split(lengths)]
    order = torch.tensor([2, 1, 3, 0], dtype=torch.int32)
    for shuffle, turns in ((0, None), (1, order), (2, None)):
        with cuda_host.shuffled(shuffle):
            assert torch.equal(run(qkv, lengths, order=turns)[0], torch.cat(alone))


def test_the_order_is_the_one_that_was_asked_for():
    # No order changes the result, but one that is none shows that it is followed.
    qkv = make_qkv([20, 70], 2, 64, torch.float16)
    out, _ = run(qkv, [20, 70], order=torch.tensor([1, 1], dtype=torch.int32))
    assert out[:20].isnan().all() and torch.equal(out[20:], run(qkv, [20, 70])[0][20:])


def test_batches_that_fill_the_gpu():
    # 128 blocks or more: each then has all queries of its heads, which small batches give to two blocks.
    lengths = [100, 70, 40, 20, *[1] * 124]
    qkv = make_qkv(lengths, 1, 64, torch.bfloat16)
    out, _ = run(qkv, lengths)
    apart = [run(part, [len(part)])[0] for part in qkv[:230].split(lengths[:4])]
    assert torch.equal(out[:230], torch.cat(apart)) and torch.equal(out[230:], qkv[230:, 2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_leaks_from_the_neighbours(value):
    lengths = [6, 70, 33, 100, 9]
    qkv = make_qkv(lengths, 2, 64, torch.bfloat16)
    clean, _ = run(qkv, lengths)
    qkv[76:109] = value
    qkv[:6] = value
    out, _ = run(qkv, lengths)
    assert out[76:109].isnan().all() and out[:6].isnan().all()
    assert torch.equal(out[6:76], clean[6:76]) and torch.equal(out[109:], clean[109:])


def test_strided_views():
    lengths = [5, 70]
    wide = make_qkv(lengths, 2, 64, torch.bfloat16)
    turned = make_qkv(lengths, 3, 64, torch.bfloat16)[:, :2].transpose(1, 2)  # (tokens, heads, 3) in memory
    unaligned = torch.cat((wide.new_zeros(1), wide.flatten()))[1:].view_as(wide)
    odd_rows = F.pad(wide, (0, 4))[..., :64]
    for view in (wide[..., 32:], turned, unaligned, odd_rows, wide.expand(-1, -1, 2, -1), wide[:, :, :, ::2]):
        view = view if view.shape[1] == 3 else view.transpose(1, 2)[:, [0, 1, 1]]
        assert torch.equal(run(view, lengths)[0], run(view.clone(memory_format=torch.contiguous_format), lengths)[0])


def test_no_tokens_and_no_log_sum_exp():
    out, lse = run(make_qkv([], 2, 64, torch.float16), [0, 0], max_seqlen=0)
    assert out.shape == (0, 2, 64) and lse.shape == (2, 0)
    qkv = make_qkv([80], 2, 64, torch.float16)
    out, lse = run(qkv, [80], save=False)
    assert lse is None and torch.equal(out, run(qkv, [80])[0])


def test_a_sequence_longer_than_promised_is_nan(monkeypatch):
    lengths = [3, 20, 16]
    qkv = make_qkv(lengths, 5, 32, torch.float16)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # not NaN from the beginning
    out, _ = run(qkv, lengths, max_seqlen=16)
    assert out[3:23].isnan().all()
    assert torch.equal(out[:3], run(qkv[:3], [3])[0]) and torch.equal(out[23:], run(qkv[23:], [16])[0])


def test_the_public_op_finds_out_the_longest_length():
    lengths = [128, 9]
    qkv = make_qkv(lengths, 2, 64, torch.float16)
    assert torch.equal(varlen_attention(qkv, borders(lengths)), run(qkv, lengths)[0])


@pytest.mark.parametrize(
    ("dtype", "size", "length", "words"),
    [
        (torch.float32, 64, 128, "bfloat16 and float16, not float32"),
        (torch.float16, 128, 128, "head sizes 32 and 64, not 128"),
        (torch.float16, 64, 129, "at most 128 tokens"),
    ],
)
def test_refusals(dtype, size, length, words):
    with pytest.raises(BackendError, match=words):
        run(make_qkv([length], 1, size, dtype), [length])
    with pytest.raises(ValueError, match="half precision, head sizes 32 and 64, and 128 tokens"):
        native.cuda.varlen_attention_fwd(
            {torch.float32: 0, torch.float16: 2}[dtype], *[0] * 8, 1, 1, 1, size, length, 1.0, 0, 0, False, 0
        )
    assert backend.refusal("cuda", "varlen_attention", torch.device("cpu"), torch.bfloat16, (64, 128)) is None


def test_the_launcher_refuses_rows_that_it_would_read_past():
    for address, stride in ((8, 0), (16, 4)):
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            native.cuda.varlen_attention_fwd(2, address, stride, *[0] * 6, 1, 1, 1, 64, 1, 1.0, 0, 0, False, 0)
