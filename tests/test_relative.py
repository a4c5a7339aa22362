"""Attention with a bias by distance, sequence by sequence, against its definition in float64."""

import math

import pytest
import torch
from torch import Tensor

from bertfast.relative import biased_attention


def draw(lengths: tuple[int, ...], heads: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    """(tokens, 3, heads, size) and a bias by distance for the longest and two more."""
    n = max(lengths, default=0) + 2
    distance = torch.arange(n)[None] - torch.arange(n)[:, None]
    table = torch.randn(heads, 2 * n, dtype=torch.float64)
    return torch.randn(sum(lengths), 3, heads, size, dtype=torch.float64), table[:, distance + n][None]


def definition(qkv: Tensor, lengths: tuple[int, ...], bias: Tensor, scale: float) -> Tensor:
    parts = []
    for rows in qkv.split(lengths):
        q, k, v = rows.unbind(1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale + bias[0, :, : len(rows), : len(rows)]
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(parts)


@pytest.mark.parametrize("lengths", [(5,), (1, 1, 4), (7, 2, 2, 0, 3), (0, 0, 1), (3, 3, 3), (64, 65)])
def test_against_the_definition(lengths: tuple[int, ...]) -> None:
    qkv, bias = (t.requires_grad_() for t in draw(lengths))
    scale = 1 / math.sqrt(8)
    ours, right = (f(qkv, lengths, bias, scale) for f in (biased_attention, definition))
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)
    dout = torch.randn_like(right)
    found, expected = (torch.autograd.grad(out, (qkv, bias), dout) for out in (ours, right))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_no_tokens() -> None:
    qkv, bias = draw(())
    assert biased_attention(qkv, (), bias, 1.0).shape == (0, 3, 8)
    assert biased_attention(qkv, (0, 0), bias, 1.0).shape == (0, 3, 8)


def test_dropout_keeps_the_mean() -> None:
    qkv, bias = (t.float() for t in draw((4, 4, 9)))
    torch.manual_seed(0)
    mean = torch.stack([biased_attention(qkv, (4, 4, 9), bias, 0.3, 0.25) for _ in range(3000)]).mean(0)
    right = biased_attention(qkv, (4, 4, 9), bias, 0.3)
    # Each probability is 0 or 4/3 of itself: of a sum of values up to 4 large, five standard errors.
    assert (mean - right).abs().max() < 5 * 4 * (1 / 3 / 3000) ** 0.5
