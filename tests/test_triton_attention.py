"""Triton's attention kernels, for short sequences and for long ones, in the interpreter: against the reference."""

import pytest

pytest.importorskip("interpreter", reason="needs triton, interpreting", exc_type=ImportError)
import interpreter
import parity
import torch
import torch.nn.functional as F

from bertfast import backend, reference
from bertfast.errors import BackendError
from bertfast.kernels import attention, attention_tiled, hardware

pytestmark = pytest.mark.usefixtures("triton_interpreted")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def borders(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make(lengths, heads, size, dtype, scale=1.0):
    return (torch.randn(sum(lengths), 3, heads, size) * scale).to(dtype), torch.randn(sum(lengths), heads, size).to(
        dtype
    )


def run(qkv, dout, lengths, order=None, scale=None, p=0.0, seed=None, longest=None):
    """(out, lse, dqkv)"""
    longest, scale = max(lengths) if longest is None else longest, qkv.shape[3] ** -0.5 if scale is None else scale
    cu_seqlens = borders(lengths)
    out, lse = attention.varlen_attention_fwd(qkv, cu_seqlens, longest, order, scale, p, seed, True)
    arguments = dout, qkv, cu_seqlens, longest, order, out, lse, scale, p, seed
    return out, lse, attention.varlen_attention_bwd(*arguments)


def plain(qkv, dout, lengths, scale=None, p=0.0, seed=None):
    """(out, dqkv) of attention in qkv's dtype throughout, as PyTorch computes it, with the reference's dropout."""
    qkv, parts = qkv.detach().requires_grad_(), []
    for b, part in enumerate(qkv.split(lengths)):
        q, k, v = part.permute(1, 2, 0, 3)
        if p:
            scores = q @ k.transpose(1, 2) * (qkv.shape[3] ** -0.5 if scale is None else scale)
            probabilities = torch.softmax(scores, dim=-1)
            multiplier = reference._attention_multiplier(probabilities.float(), b, p, seed)
            parts.append(((probabilities * multiplier).to(qkv.dtype) @ v).transpose(0, 1))
        else:
            parts.append(F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0].transpose(0, 1))
    out = torch.cat(parts)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def check(lengths, heads, size, dtype, order=None, scale=None, p=0.0, seed=None, magnitude=1.0):
    qkv, dout = make(lengths, heads, size, dtype, magnitude)
    out, lse, dqkv = run(qkv, dout, lengths, order, scale, p, seed)
    wide, cu_seqlens = qkv.double(), borders(lengths)
    baseline = plain(qkv, dout, lengths, scale, p, seed) if dtype != FLOAT32 else (None, None)
    parity.check(out, reference.varlen_attention(wide, cu_seqlens, scale, p, seed), baseline[0], name="out")
    parity.check(lse, reference.varlen_attention_lse(wide, cu_seqlens, scale).double(), name="lse")
    gold = reference.varlen_attention_backward(dout.double(), wide, cu_seqlens, scale, p, seed)
    for i, name in enumerate(("dq", "dk", "dv")):
        theirs = None if baseline[1] is None else baseline[1][:, i]
        parity.check(dqkv[:, i], gold[:, i], theirs, factor=3.0, name=name)


# Both sides of every length at which heads share a tile otherwise, in batches of every class; heads that do not fill
# their last tile.
SHORT = [
    ([16, 0, 1, 15, 2], 5),
    ([17, 16, 32, 3, 31], 5),
    ([33, 64, 16, 63, 1, 32, 0], 3),
    ([65, 0, 127, 128, 1, 17, 64, 33], 2),
]


@pytest.mark.parametrize(("size", "dtype"), [(64, BFLOAT16), (32, FLOAT16), (128, FLOAT16)])
@pytest.mark.parametrize(("lengths", "heads"), SHORT, ids=str)
def test_short_sequences(lengths, heads, size, dtype):
    order = torch.tensor(lengths).argsort(descending=True).int()
    check(lengths, heads, size, dtype, order)


@pytest.mark.parametrize(
    ("lengths", "heads", "size", "dtype"),
    [
        ([129, 31, 0, 64, 1], 2, 64, BFLOAT16),
        ([200, 128, 5], 1, 128, BFLOAT16),
        ([513, 65, 192], 1, 32, FLOAT16),
        ([0, 33, 1, 16, 50], 2, 64, FLOAT32),
        ([17, 40], 1, 128, FLOAT32),
    ],
    ids=str,
)
def test_long_sequences(lengths, heads, size, dtype):
    check(lengths, heads, size, dtype)


@pytest.mark.parametrize(
    ("lengths", "heads", "size"), [([33, 0, 16, 30], 3, 64), ([128, 90, 9], 2, 32), ([150, 64], 1, 64)]
)
def test_dropout(lengths, heads, size):
    check(lengths, heads, size, BFLOAT16, p=0.1, seed=torch.tensor([2**50 + 3]))


@pytest.mark.parametrize("scale", [3.0, -0.4, 0.0])
@pytest.mark.parametrize("lengths", [[40, 3], [100, 9], [130]], ids=str)
def test_large_scores_and_other_scales(lengths, scale):
    check(lengths, 2, 32, FLOAT16, scale=scale, magnitude=2.0 if scale == 3.0 else 1.0)


@pytest.mark.parametrize("lengths", [[40], [100], [130]], ids=str)
def test_scores_far_below_zero(lengths):
    # 0, the score of a key that is not there, would be infinitely more probable than all that are.
    qkv, dout = make(lengths, 1, 32, BFLOAT16)
    qkv[:, 0], qkv[:, 1] = qkv[:, 0] / 8 + 6, qkv[:, 1] / 8 - 6
    out, _, dqkv = run(qkv, dout, lengths)
    parity.check(out, reference.varlen_attention(qkv.double(), borders(lengths)), plain(qkv, dout, lengths)[0])
    assert dqkv.isfinite().all()


@pytest.mark.parametrize("threshold", [256, 6656, 32768, 60160])
@pytest.mark.parametrize(
    ("lengths", "longest"), [([16, 9, 2], 16), ([32, 20], 32), ([64, 5], 64), ([128, 70, 33], 128), ([150], 150)]
)
def test_dropout_is_the_reference_s_bit_for_bit(lengths, longest, threshold):
    # Queries of zeros give every key the same probability, and values that are rows of the identity show it as it is:
    # 64 keys a run. Rows of the identity as the output's gradient show the backward's as the gradient of the values.
    heads, size = 3 if longest <= 128 else 1, 64
    seed, p = torch.tensor([-(2**40) - 11]), threshold / 65536
    forward, backward = [], []
    for begin in range(0, longest, 64):
        qkv, dout = torch.zeros(sum(lengths), 3, heads, size, dtype=FLOAT16), torch.zeros(sum(lengths), heads, size)
        for values, gradient in zip(qkv[:, 2].split(lengths), dout.split(lengths), strict=True):
            rows = torch.arange(max(0, min(64, len(values) - begin)))
            values[begin + rows, :, rows] = 1
            gradient[begin + rows, :, rows] = 1
        out, _, dqkv = run(qkv, dout.half(), lengths, p=p, seed=seed, longest=longest)
        forward.append(out.split(lengths))
        backward.append(dqkv[:, 2].split(lengths))
    for b, length in enumerate(lengths):
        wanted = reference._attention_multiplier(torch.zeros(heads, length, length), b, p, seed)
        by_query = torch.cat([parts[b] for parts in forward], dim=2)[..., :length].permute(1, 0, 2).float() * length
        by_key = torch.cat([parts[b] for parts in backward], dim=2)[..., :length].permute(1, 2, 0).float() * length
        for drawn in (by_query, by_key):
            assert torch.equal(drawn != 0, wanted != 0)
            torch.testing.assert_close(drawn, wanted, rtol=3e-3, atol=0)


@pytest.mark.parametrize(("lengths", "size"), [([40, 100, 7, 16], 64), ([130, 20, 65], 32)], ids=str)
def test_the_order_does_not_show(lengths, size):
    qkv, dout = make(lengths, 2, size, BFLOAT16)
    seed = torch.tensor([3])
    first = run(qkv, dout, lengths, p=0.1, seed=seed)
    for order in (torch.arange(len(lengths)).flip(0), torch.randperm(len(lengths))):
        again = run(qkv, dout, lengths, order.int(), p=0.1, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_sequence_is_alone_in_any_batch():
    lengths = [128, 33, 7, 16, 90, 64, 32]
    qkv, dout = make(lengths, 3, 64, BFLOAT16)
    out, _, dqkv = run(qkv, dout, lengths)
    among_long = [*lengths, 130]
    more, more_dout = (torch.cat((t, s)) for t, s in zip((qkv, dout), make([130], 3, 64, BFLOAT16), strict=True))
    longer, _, _ = run(more, more_dout, among_long)
    begins = borders(lengths).tolist()
    for begin, length in zip(begins, lengths, strict=False):
        part = slice(begin, begin + length)
        alone, _, gradient = run(qkv[part], dout[part], [length])
        assert torch.equal(alone, out[part]) and torch.equal(gradient, dqkv[part])
        # Beside a longer one it has other tiles, and numpy adds up products of another shape in another order.
        torch.testing.assert_close(alone, longer[part], rtol=2**-7, atol=2**-9)


def test_two_programs_share_a_long_head_where_there_are_few():
    qkv, dout = make([128, 100, 10], 2, 64, BFLOAT16)
    grids, results = [], []
    for multiprocessors in (1, 132):
        with hardware.pretend(90, multiprocessors), interpreter.launches() as launches:
            results.append(run(qkv, dout, [128, 100, 10])[0])
        grids.append(launches[0].grid[0])
    assert grids == [6, 12] and torch.equal(*results)


@pytest.mark.parametrize("lengths", [[6, 16, 9], [6, 33, 20], [6, 70, 33, 100, 9], [6, 140, 33, 100]], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_leaks_from_the_neighbours(lengths, value):
    qkv, dout = make(lengths, 2, 32, BFLOAT16)
    clean = run(qkv, dout, lengths)
    bad = torch.zeros(sum(lengths), dtype=torch.bool)
    bad[: lengths[0]] = True
    bad[lengths[0] + lengths[1] : sum(lengths[:3])] = True
    qkv[bad] = value
    out, lse, dqkv = run(qkv, dout, lengths)
    assert out[bad].isnan().all() and dqkv[bad].isnan().all()
    assert torch.equal(out[~bad], clean[0][~bad]) and torch.equal(dqkv[~bad], clean[2][~bad])
    assert torch.equal(lse[:, ~bad], clean[1][:, ~bad])


@pytest.mark.parametrize("lengths", [[5, 70], [131, 4]], ids=str)
def test_strided_and_unaligned_views(lengths):
    wide, dout = make(lengths, 1, 64, BFLOAT16)
    turned = make(lengths, 3, 64, BFLOAT16)[0][:, :1].transpose(1, 2)  # (tokens, heads, 3) in memory
    for view in (wide[..., 32:], turned, parity.misaligned(wide), wide[:, :, :, ::2]):
        gradient = dout[..., : view.shape[3]]
        dense = run(view.clone(memory_format=torch.contiguous_format), gradient.contiguous(), lengths)
        assert all(torch.equal(a, b) for a, b in zip(run(view, gradient, lengths), dense, strict=True))


def test_no_tokens():
    out, lse, dqkv = run(*make([], 2, 64, FLOAT16), [0, 0])
    assert out.shape == (0, 2, 64) and lse.shape == (2, 0) and dqkv.shape == (0, 3, 2, 64)
    assert (
        attention.varlen_attention_fwd(*(make([3], 1, 32, FLOAT16)[0], borders([3]), 3, None, 1.0, 0.0, None, False))[1]
        is None
    )


@pytest.mark.parametrize("lengths", [[33, 100], [130]], ids=str)
def test_tf32_where_pytorch_allows_it(lengths, monkeypatch):
    monkeypatch.setattr(attention, "precision", lambda dtype: "tf32")
    qkv, dout = make(lengths, 2, 32, FLOAT32)
    out, _, dqkv = run(qkv, dout, lengths)
    gold = reference.varlen_attention(qkv.double(), borders(lengths))
    gradient = reference.varlen_attention_backward(dout.double(), qkv.double(), borders(lengths))
    assert 1e-6 < (out - gold).abs().max() < 5e-3 and (dqkv - gradient).abs().max() < 2e-2


def test_products_of_float32_are_as_exact_as_pytorch_is_told():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert attention.precision(FLOAT32) == attention.precision(BFLOAT16) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert attention.precision(FLOAT32) == "tf32" and attention.precision(BFLOAT16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_larger_heads_are_refused():
    with pytest.raises(BackendError, match="head sizes of at most 128, not 129"):
        backend.explain("varlen_attention", "cpu", BFLOAT16, (129, 64))


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
def test_tiles_of_every_gpu(architecture):
    for dtype in (BFLOAT16, FLOAT32):
        for block_size in (16, 32, 64, 128):
            for precision in ("ieee", "tf32"):
                for tile in attention_tiled.choose(architecture, dtype, block_size, precision):
                    # Dropout numbers the keys by 64; the queries of a tile begin anywhere.
                    assert tile.keys % 64 == 0 or 64 % tile.keys == 0


def test_the_tiles_of_other_gpus_calculate_the_same():
    lengths = [150, 70]
    qkv, dout = make(lengths, 1, 64, BFLOAT16)
    gold = reference.varlen_attention_backward(dout.double(), qkv.double(), borders(lengths))
    for architecture in (80, 86):
        with hardware.pretend(architecture, 84):
            _, _, dqkv = run(qkv, dout, lengths)
        parity.check(dqkv, gold, plain(qkv, dout, lengths)[1], factor=3.0)
