"""linear against the reference in float64, and its packed weights against every way of changing a weight."""

import copy
import pickle
import sys

import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bertfast import backend, layout, native, reference
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
    assert packed.nbytes >= module.weight.numel() * 4
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
    opcheck(torch.ops.bertfast.linear_backward, (torch.randn(5, 12), x.detach(), [w.detach() for w in weights], True))


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


def neighbours(*shapes):
    """Dense tensors one behind another in one storage."""
    storage = torch.randn(sum(torch.Size(s).numel() for s in shapes))
    return [t.view(s) for t, s in zip(storage.split([torch.Size(s).numel() for s in shapes]), shapes, strict=True)]


def test_neighbours_in_one_storage_are_one_tensor():
    tensors = neighbours((3, 4), (5, 4), (2, 4))
    joined = layout.adjacent(tensors)
    assert joined.data_ptr() == tensors[0].data_ptr() and torch.equal(joined, torch.cat(tensors))
    tensors[1].zero_()  # the same memory
    assert not joined[3:8].any()
    biases = neighbours((3,), (5,))
    assert torch.equal(layout.adjacent(biases), torch.cat(biases))
    assert layout.adjacent(tensors[:1]) is tensors[0]
    parameters = [torch.nn.Parameter(t) for t in tensors]
    with torch.no_grad():
        assert torch.equal(layout.adjacent(parameters), torch.cat(parameters))


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.randn(3, 4), torch.randn(3, 4)],
        neighbours((3, 4), (5, 4), (2, 4))[::2],  # a gap
        neighbours((3, 4), (5, 4))[::-1],
        [t.t() for t in neighbours((4, 4), (4, 4))],  # not dense
        [neighbours((3, 4), (5, 4))[0]] * 2,
    ],
    ids=["apart", "gap", "order", "transposed", "twice the same"],
)
def test_others_are_not(tensors):
    assert layout.adjacent(tensors) is None


def test_neighbours_by_chance_are_not_one_tensor():
    memory = bytearray(32)
    first, second = (torch.frombuffer(memory, dtype=torch.float32, count=4, offset=o).view(2, 2) for o in (0, 16))
    assert first.data_ptr() + first.nbytes == second.data_ptr() and layout.adjacent([first, second]) is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_neighbouring_weights_are_one_gemm_without_a_copy(activation, monkeypatch):
    weights, biases = neighbours((6, 8), (6, 8), (4, 8)), neighbours((6,), (6,), (4,))
    x = torch.randn(5, 8)
    wanted = reference.linear(x, weights, biases, activation)
    wanted_gradients = gradients(x, [w.clone() for w in weights], [b.clone() for b in biases])

    def forbidden(*_, **__):
        raise AssertionError("copied")

    gemms = []
    monkeypatch.setattr(torch, "cat", forbidden)
    monkeypatch.setattr(torch, "addmm", forbidden)
    monkeypatch.setattr(F, "linear", lambda *a, f=F.linear: gemms.append(a) or f(*a))
    with backend.use("reference"):
        torch.testing.assert_close(linear(x, weights, biases, activation=activation), wanted)
        assert len(gemms) == 1
        torch.testing.assert_close(gradients(x, weights, biases), wanted_gradients)


def gradients(x, weights, biases):
    leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    n = len(weights)
    with backend.use("reference"):
        out = linear(leaves[0], leaves[1 : n + 1], leaves[n + 1 :])
    return torch.autograd.grad(out.square().sum(), leaves)


def test_a_backward_without_biases_sums_none():
    x, weights, _ = make_inputs(5, 16, (8, 4), torch.float32)
    dx, dweight, dbias = torch.ops.bertfast.linear_backward(torch.randn(5, 12), x, weights, False)
    assert dx.shape == (5, 16) and dweight.shape == (12, 16) and dbias.shape == (0,)


# Rows, in_features and out_features beside the borders of tiles and of 16 bytes; one weight, several, none of a size.
TRITON_SHAPES = [
    (1, 64, (312,)),
    (31, 312, (96, 96, 96)),
    (65, 64, (768,)),
    (200, 312, (312,)),
    (7, 33, (17, 5)),
    (0, 8, (8,)),
    (3, 0, (4,)),
]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("card", [(90, 132), (80, 108)], ids=["hopper", "ampere"])
def test_triton_parity(triton_interpreted, card, dtype):
    from bertfast.kernels import hardware

    for i, shape in enumerate(TRITON_SHAPES):
        x, weights, biases = make_inputs(*shape, dtype)
        for j, some in enumerate((biases, [])):
            activation = ACTIVATIONS[(i + j) % 3]
            with hardware.pretend(*card), torch.no_grad():
                out = linear(x, weights, some, activation=activation)
            gold = reference.linear(x.double(), wide(weights), wide(some), activation)
            parity.check(out, gold, reference.linear(x, weights, some, activation), name=f"{shape} {activation}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_takes_any_layout(triton_interpreted, dtype):
    x, (weight,), (bias,) = make_inputs(40, 48, (72,), dtype)
    wanted = F.linear(x, weight, bias)
    rows = torch.cat((x, x), dim=1)[:, :48]
    with torch.no_grad():
        for same in (x, parity.misaligned(x), rows, x.t().contiguous().t()):
            torch.testing.assert_close(linear(same, weight.t().contiguous().t(), bias), wanted)


def test_triton_gives_a_row_the_same_bits_in_any_batch(triton_interpreted):
    x, weights, biases = make_inputs(300, 200, (136,), torch.bfloat16)
    with torch.no_grad():
        whole = linear(x, weights, biases, activation="gelu")
        for few in (1, 70, 300):
            assert torch.equal(linear(x[:few], weights, biases, activation="gelu"), whole[:few])


@pytest.mark.parametrize("architecture", [80, 90])
def test_triton_goes_through_all_tiles(triton_interpreted, architecture, monkeypatch):
    from bertfast.kernels import hardware
    from bertfast.kernels import linear as kernels

    x, weights, biases = make_inputs(300, 64, (528,), torch.float16)
    wanted = reference.linear(x.double(), wide(weights), wide(biases), "gelu")
    for tile in {*kernels.TILES[architecture], kernels.SMALL}:
        monkeypatch.setitem(kernels.TILES, architecture, (tile,))
        with hardware.pretend(architecture, 3), torch.no_grad():
            out = linear(x, weights, biases, activation="gelu")
        parity.check(out, wanted, plain(x, weights, biases, "gelu"), name=f"{tile}")


def test_triton_is_told_what_tf32_is(triton_interpreted):
    x, weights, biases = make_inputs(20, 64, (32,), torch.float32)
    gold = reference.linear(x.double(), wide(weights), wide(biases))
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            with torch.no_grad():
                errors[precision] = (linear(x, weights, biases) - gold).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 1e-5 < 1e-4 < errors["high"] < 1e-2


def test_triton_loads_what_it_has_to(triton_interpreted):
    import interpreter

    from bertfast.kernels import hardware

    x, weights, biases = make_inputs(256, 64, (512,), torch.float16)
    with hardware.pretend(90, 132), torch.no_grad(), interpreter.launches() as launches:
        linear(x, weights, biases, activation="gelu")
    (launch,) = launches
    assert launch.stored["out"] == 256 * 512 * 2  # once, in half precision: the GELU is in it


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["triton", "cuda", "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parity_on_the_gpu(which, activation, dtype):
    for shape in [*TRITON_SHAPES, (5000, 768, (3072,)), (700, 3072, (768,)), (513, 768, (768, 768, 768))]:
        x, *sequences = make_inputs(*shape, dtype)
        x, (weights, biases) = x.cuda(), ([t.cuda() for t in s] for s in sequences)
        with backend.use(which), torch.no_grad():
            out = linear(x, weights, biases, activation=activation)
            joined = linear(x, torch.cat(weights).split(shape[2]), torch.cat(biases).split(shape[2]))
        gold = reference.linear(x.double(), wide(weights), wide(biases), activation)
        baseline = reference.linear(x, weights, biases, activation)
        parity.check(out, gold, baseline, name=f"{shape}")
        if activation == "none":
            parity.check(joined, gold, baseline, name=f"{shape}, neighbours")


class OnGpu:
    """What `_shape` and the choice look at of a CUDA tensor."""

    def __init__(self, rows):
        self.device, self.dtype, self.shape = torch.device("cuda", 0), torch.float16, (rows, 768)

    def dim(self):
        return 2


def test_triton_is_chosen_only_where_it_was_measured_to_win(monkeypatch):
    ours = sys.modules["bertfast.ops.linear"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend, "_choices", {})
    ours._major.cache_clear()
    weights = [torch.empty(3072, 768, device="meta")]

    def chosen(rows):
        x = OnGpu(rows)
        return backend.explain("linear", x.device, x.dtype, ours._shape(x, weights, "gelu"))

    with backend.use("auto"):
        assert chosen(16384).backend != "triton" and "triton" not in chosen(16384).refused
        monkeypatch.setitem(backend.PREFERENCES, ("linear", 9), ("triton", "cuda", "reference"))
        assert "not measured" in chosen(16384).refused["triton"]
        monkeypatch.setitem(ours.TRITON_FROM, (9, "gelu", 3072, 768), 8192)
        backend._choices.clear()
        assert chosen(16384).backend == "triton"
        assert "from 8192 rows" in chosen(100).refused["triton"]
    monkeypatch.setitem(ours.TRITON_FROM, (9, "gelu", 3072, 768), 1 << 40)
    with backend.use("triton"):
        assert chosen(1).backend == "triton"
    ours._major.cache_clear()
