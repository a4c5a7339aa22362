"""feed_forward against the reference in float64, and what it keeps for its backward."""

import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bertfast import reference
from bertfast.ops import PackedWeights, feed_forward

DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = ["gelu", "gelu_tanh"]
# (tokens, hidden, features, out_features)
SHAPES = [(0, 8, 16, 8), (1, 8, 16, 8), (17, 24, 96, 24), (65, 33, 130, 17)]


def make_inputs(tokens, hidden, features, outside, dtype):
    x = torch.randn(tokens, hidden, dtype=dtype)
    up = 2 * torch.randn(features, hidden, dtype=dtype) / hidden**0.5
    return [x, up, torch.randn(features, dtype=dtype), torch.randn(outside, features, dtype=dtype) / features**0.5]


def plain(activation):
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return lambda x, up, bias, down: F.linear(F.gelu(F.linear(x, up, bias), approximate=approximate), down)


def check_parity(shape, activation, dtype, device="cpu"):
    parity.check_gradients(
        lambda *t: feed_forward(*t, activation=activation),
        lambda *t: reference.feed_forward(*t, activation=activation),
        plain(activation),
        [t.to(device) for t in make_inputs(*shape, dtype)],
        ("x", "up", "up_bias", "down"),
        rows=max(shape[0], 1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_in_both_directions(implementation, shape, activation, dtype):
    check_parity(shape, activation, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 768, 3072, 768)])
def test_parity_on_the_gpu(shape, activation, dtype):
    check_parity(shape, activation, dtype, "cuda")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs = [t.requires_grad_() for t in make_inputs(3, 4, 6, 5, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: feed_forward(*t, activation=activation), inputs)


def test_opcheck():
    _, _, bias, down = make_inputs(3, 4, 6, 5, torch.float32)
    inputs = [t.requires_grad_() for t in (torch.randn(3, 6), bias, down)]
    opcheck(torch.ops.bertfast.gelu_linear.default, (*inputs, "none"))


def test_keeps_no_activations_but_those_before_the_activation():
    """Apart from the parameters: x and one (tokens, features) tensor."""
    inputs = [t.requires_grad_() for t in make_inputs(17, 24, 96, 24, torch.float32)]
    kept = {}

    def keep(t):
        kept[t.data_ptr()] = tuple(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        feed_forward(*inputs)
    for t in inputs[1:]:
        kept.pop(t.data_ptr(), None)
    assert sorted(kept.values()) == [(17, 24), (17, 96)]


def test_what_the_backward_reads_twice_it_leaves_as_it_was():
    inputs = [t.requires_grad_() for t in make_inputs(17, 24, 96, 24, torch.float32)]
    out = feed_forward(*inputs)
    dout = torch.randn_like(out)
    before = dout.clone()
    first = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    second = torch.autograd.grad(out, inputs, dout)
    assert torch.equal(dout, before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_autocast():
    inputs = [t.requires_grad_() for t in make_inputs(17, 24, 96, 24, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out, stock = feed_forward(*inputs), plain("gelu")(*inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, stock, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


def test_training_drops_packed_weights():
    inputs = make_inputs(17, 24, 96, 24, torch.float32)
    up, down = PackedWeights(), PackedWeights()
    with torch.no_grad():
        feed_forward(*inputs, up_packed=up, down_packed=down)
    packed = up.nbytes, down.nbytes
    feed_forward(inputs[0].requires_grad_(), *inputs[1:], up_packed=up, down_packed=down)
    assert (up.nbytes, down.nbytes) == (0, 0) and (packed[0] > 0) is (packed[1] > 0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activation": "relu"}, ValueError, "activation must be"),
        ({"activation": "none"}, ValueError, "activation must be"),
        ({"down_weight": torch.zeros(5, 7)}, ValueError, "weight has shape"),
        ({"up_bias": torch.zeros(5)}, ValueError, "bias has shape"),
        ({"up_weight": torch.zeros(6, 4, dtype=torch.float64)}, TypeError, "weight is torch.float64"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_input(change, error, words, training):
    names = ("x", "up_weight", "up_bias", "down_weight")
    arguments = dict(zip(names, make_inputs(3, 4, 6, 5, torch.float32), strict=True))
    arguments["x"].requires_grad_(training)
    with pytest.raises(error, match=words):
        feed_forward(**(arguments | change))
