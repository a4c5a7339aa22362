"""linear against the reference in float64, and its packed weights against every way of changing a weight."""

import copy
import pickle

import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bertfast import backend, native, reference
from bertfast.ops import PackedWeights, linear

DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = ["none", "gelu", "gelu_tanh"]
ON_CPU_KERNELS = pytest.mark.skipif(
    native.cpu is None, reason=f"packed weights need the cpu backend: {native.cpu_reason}"
)


def make_inputs(tokens, inside, outside, dtype):
    weights = [torch.randn(n, inside, dtype=dtype) / inside**0.5 for n in outside]
    return torch.randn(tokens, inside, dtype=dtype), weights, [torch.randn(n, dtype=dtype) for n in outside]


def plain(x, weights, biases, activation="none"):
    y = F.linear(x, torch.cat(list(weights)), torch.cat(list(biases)))
    return y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def wide(tensors):
    return [t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 64, (64,)), (17, 96, (48, 48, 48)), (130, 312, (1248,)), (0, 8, (4, 5))])
@pytest.mark.parametrize("packed", [True, False])
def test_inference_parity(implementation, shape, activation, dtype, packed):
    x, weights, biases = make_inputs(*shape, dtype)
    out = linear(x, weights, biases, activation=activation, packed=PackedWeights() if packed else None)
    gold = reference.linear(x.double(), wide(weights), wide(biases), activation)
    parity.check(out, gold, plain(x, weights, biases, activation))
    parity.check(
        linear(x, weights), reference.linear(x.double(), wide(weights)), plain(x, weights, [0 * b for b in biases])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(implementation, activation, dtype):
    x, weights, biases = make_inputs(33, 40, (24, 16, 8), dtype)

    def calls(function):
        return lambda x, *t: function(x, t[:3], t[3:], activation)

    parity.check_gradients(
        calls(lambda x, w, b, activation: linear(x, w, b, activation=activation)),
        calls(reference.linear),
        calls(plain),
        [x, *weights, *biases],
        ("x", "w0", "w1", "w2", "b0", "b1", "b2"),
        rows=33,
    )


def step(**how):
    def change(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, **how)
        module(torch.ones(2, 16)).sum().backward()
        optimizer.step()

    return change


def doubled(module):
    return {k: 2 * v for k, v in module.state_dict().items()}


# Every way a weight is known to change, the last three behind autograd's back: they leave its version as it was.
CHANGES = {
    "optimizer": step(foreach=False),
    "foreach optimizer": step(foreach=True),
    "load_state_dict": lambda m: m.load_state_dict(doubled(m)),
    "assign": lambda m: m.load_state_dict(doubled(m), assign=True),
    "init": lambda m: torch.nn.init.normal_(m.weight),
    "detach": lambda m: m.weight.detach().mul_(2),
    "to": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "set data": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "fused optimizer": step(fused=True),
    "write to data": lambda m: m.weight.data.mul_(2),
    "numpy": lambda m: m.weight.detach().numpy().__imul__(2),
}


@ON_CPU_KERNELS
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_packed_anew(change):
    module, packed, x = torch.nn.Linear(16, 24), PackedWeights(), torch.randn(4, 16)

    def ours():
        with torch.no_grad(), backend.use("cpu"):
            return linear(x, module.weight, module.bias, packed=packed)

    first = ours()
    assert packed.nbytes == module.weight.numel() * 4
    with torch.enable_grad():
        change(module)
    second = ours()
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, module(x).detach())


@ON_CPU_KERNELS
def test_training_drops_the_copy_and_copies_are_empty():
    module, packed = torch.nn.Linear(16, 24), PackedWeights()
    with torch.no_grad():
        linear(torch.randn(4, 16), module.weight, module.bias, packed=packed)
    assert packed.nbytes
    assert copy.deepcopy(packed).nbytes == pickle.loads(pickle.dumps(packed)).nbytes == 0
    linear(torch.randn(4, 16), module.weight, module.bias, packed=packed).sum().backward()
    assert packed.nbytes == 0


@ON_CPU_KERNELS
def test_inference_tensors_are_not_packed():
    packed = PackedWeights()
    with torch.inference_mode():
        weight, x = torch.randn(8, 16), torch.randn(4, 16)
        first = linear(x, weight, packed=packed)
        weight.mul_(2)  # an inference tensor has no version that would tell
        torch.testing.assert_close(linear(x, weight, packed=packed), 2 * first)
    assert packed.nbytes == 0


def test_autocast_computes_in_its_dtype():
    x, weights, biases = make_inputs(5, 16, (8,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(x.requires_grad_(), weights, biases)
        assert out.dtype == F.linear(x, weights[0], biases[0]).dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_autocast_does_not_pack_what_it_converted():
    x, (weight,), _ = make_inputs(5, 16, (8,), torch.float32)
    packed = PackedWeights()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = linear(x, weight, packed=packed)
        weight.mul_(2)
        assert torch.equal(linear(x, weight, packed=packed), 2 * first) and not packed.nbytes


def test_opcheck(implementation):
    x, weights, biases = make_inputs(5, 16, (8, 4), torch.float32)
    leaves = [t.requires_grad_() for t in weights], [t.requires_grad_() for t in biases]
    opcheck(torch.ops.bertfast.linear, (x.requires_grad_(), *leaves, "none"))
    opcheck(torch.ops.bertfast.linear, (x.detach(), [w.detach() for w in weights], [], "gelu"))
    opcheck(torch.ops.bertfast.linear_backward, (torch.randn(5, 12), x.detach(), [w.detach() for w in weights]))


def test_compiles_whole_and_once_for_all_lengths(compiles_once):
    _, weights, biases = make_inputs(1, 16, (8, 8, 8), torch.float32)
    tensors = [*weights, *biases]
    compiles_once(
        lambda rows: [torch.randn(rows, 16), *tensors],
        lambda x, *t: linear(x, t[:3], t[3:], activation="gelu", packed=PackedWeights()),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": torch.zeros(4)}, ValueError, "tokens, in_features"),
        ({"weight": torch.zeros(3, 5)}, ValueError, "weight has shape"),
        ({"bias": torch.zeros(4)}, ValueError, "bias has shape"),
        ({"weight": torch.zeros(3, 4).double()}, TypeError, "weight is torch.float64"),
        ({"bias": [torch.zeros(3)] * 2}, ValueError, "1 weights and 2 biases"),
        ({"activation": "relu"}, ValueError, "relu"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        linear(**{"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), **arguments})
