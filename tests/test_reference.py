"""The parts of the specification that have an oracle of their own."""

import pytest
import torch
import torch.nn.functional as F

from bertfast import reference

# The known answers of Philox4x32-7 that its authors publish with their implementation (Random123, kat_vectors).
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    seed = key[0] | key[1] << 32
    seed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    assert [int(w) for w in reference.philox(seed, [torch.tensor([c]) for c in counter])] == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p):
    x = torch.ones(1000, 1001)
    out = reference.dropout(x, p, torch.tensor([12345]))
    assert abs((out == 0).float().mean() - p) < 0.002
    assert abs(out.mean() - 1) < 0.01
    kept = (out != 0).float() - (1 - p)
    for shift in (1, 8):  # neighbours, and neighbours' generator calls, are uncorrelated
        assert abs((kept[:, shift:] * kept[:, :-shift]).mean()) < 0.002
        assert abs((kept[shift:] * kept[:-shift]).mean()) < 0.002


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_of_keys(p):
    seed, (heads, queries, keys) = torch.tensor([-(2**50) - 9]), (3, 300, 450)
    head, query = torch.arange(heads)[:, None, None], torch.arange(queries)[:, None]
    multiplier = reference.key_dropout_multiplier(seed, p, keys, (query, head, torch.tensor([[7]])))
    threshold = round(256 * p)
    assert multiplier.shape == (heads, queries, keys)
    assert multiplier.unique().tolist() == pytest.approx([0, 256 / (256 - threshold)])
    assert abs(multiplier.mean() - 1) < 0.02
    kept = (multiplier != 0).float() - (1 - threshold / 256)
    for shift in (1, 2, 8, 16, 64):  # bytes of a word, of a call, and other calls are uncorrelated
        assert abs((kept[..., shift:] * kept[..., :-shift]).mean()) < 0.003
    for key in (0, 1, 2, 7, 8, 9, 15, 16, 63, 64, 201, 449):
        call, word, byte = 4 * (key // 64) + key // 2 % 4, key // 16 % 4, key // 8 % 2 * 2 + key % 2
        words = reference.philox(seed, [torch.tensor(c) for c in (call, 299, 2, 7)])
        drawn = int(words[word]) >> 8 * byte & 255
        assert (multiplier[2, 299, key] != 0) == (drawn >= threshold)


def test_dropout_thresholds():
    assert [reference.dropout_threshold(p) for p in (0.1, 1e-6, 0.9999999)] == [6554, 0, 65535]
    # of attention, in steps of 2^-8
    assert [reference.dropout_threshold(p, 8) for p in (0.1, 0.001, 0.9999)] == [26 * 256, 0, 255 * 256]


def test_formulas_are_pytorchs():
    x, residual = torch.randn(2, 5, 12, dtype=torch.float64)
    weight, bias, x_bias = torch.randn(3, 12, dtype=torch.float64)
    norm = F.layer_norm(x + x_bias + residual, (12,), weight, bias, 1e-5)
    torch.testing.assert_close(reference.residual_layer_norm(x, residual, weight, bias, 1e-5, x_bias), norm)
    for approximate in ("none", "tanh"):
        gelu = F.gelu(x + x_bias, approximate=approximate)
        torch.testing.assert_close(reference.bias_gelu(x, x_bias, approximate), gelu)
    qkv = torch.randn(5, 3, 2, 6, dtype=torch.float64)
    q, k, v = qkv.permute(1, 2, 0, 3)[:, None]
    attention = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    out = reference.varlen_attention(qkv, torch.tensor([0, 5], dtype=torch.int32))
    torch.testing.assert_close(out, attention)
