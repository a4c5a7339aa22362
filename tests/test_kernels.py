"""What the Triton launchers of the row ops ask for: grids, addresses, bytes, bits that do not depend on the GPU."""

import pytest
import torch

pytest.importorskip("interpreter", reason="needs triton, interpreting", exc_type=ImportError)
import interpreter
import numpy as np
import triton
import triton.language as tl

from bertfast import backend, reference
from bertfast.kernels import columns, dropout, embedding, gelu, hardware, norm
from bertfast.ops import bias_gelu, embed_layer_norm, residual_layer_norm
from bertfast.ops.norm import WIDEST_IN_TRITON

EPS = 1e-12


def test_the_gpu_is_pretended_for_tensors_that_are_on_none():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert (hardware.architecture(cpu), hardware.multiprocessors(meta)) == (90, 132)
    with pytest.raises(KeyError), hardware.pretend(80, 108):
        assert (hardware.architecture(meta), hardware.multiprocessors(cpu)) == (80, 108)
        raise KeyError
    assert (hardware.architecture(cpu), hardware.multiprocessors(cpu)) == (90, 132)


def test_tiles_have_room_for_every_row_that_is_not_refused():
    assert all(name == tile.columns and name // tile.warps in (128, 256) for name, tile in norm.TILES.items())
    assert max(norm.TILES) == WIDEST_IN_TRITON
    assert all(
        norm.tile(h).columns >= h and (h <= 128 or norm.tile(h).columns < 2 * h) for h in range(1, WIDEST_IN_TRITON + 1)
    )


@triton.jit
def _multiplier_kernel(
    seed, rows, out, threshold, scale, COUNT: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    row = tl.load(rows + tl.arange(0, COUNT))
    multiplier = dropout.row_multiplier(tl.load(seed), threshold, scale, row, BLOCK, VECTOR)
    tl.store(out + tl.arange(0, COUNT)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], multiplier)


@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("seed", [0, 5, -1, -0x123456789ABCDEF, 2**62 + 3])
@pytest.mark.parametrize("p", [0.1, 0.5, 1e-6, 0.999999])
def test_dropout_multipliers_are_those_of_the_reference(p, seed, vector):
    seed, rows = torch.tensor([seed]), torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32, 2**32 + 7, 2**40, 3])
    out = torch.empty(8, 128)
    _multiplier_kernel[(1,)](seed, rows, out, *dropout.settings(p, seed), 8, 128, vector)
    counter = (rows[:, None] & 0xFFFFFFFF, rows[:, None] >> 32, torch.zeros(8, 1, dtype=torch.int64))
    assert torch.equal(out, reference.dropout_multiplier(seed, p, 128, counter))


@triton.jit
def _gelu_kernel(x, value, slope, TANH: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    u = tl.load(x + i)
    tl.store(value + i, gelu.gelu(u, TANH, PRECISE))
    tl.store(slope + i, gelu.gelu_derivative(u, TANH, PRECISE))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("precise", "limit"), [(True, 3e-6), (False, 4e-5)])  # bfloat16 rounds by up to 2e-3
def test_gelu_is_finer_than_its_rounding(precise, limit, approximate):
    x = torch.linspace(-5.6, 9, 2048)
    value, slope = torch.empty(2, 2048)
    _gelu_kernel[(1,)](x, value, slope, approximate == "tanh", precise, 2048)
    wide = x.double().requires_grad_()
    gold = reference.bias_gelu(wide, approximate=approximate)
    (gold_slope,) = torch.autograd.grad(gold.sum(), wide)
    assert (slope - gold_slope).abs().max() < limit
    if approximate == "none":  # the tail keeps its relative precision, where 1 + erf would cancel
        assert ((value - gold) / gold).abs().max() < limit
    else:
        assert (value - gold).abs().max() < limit


def test_chunks_depend_on_the_rows_alone_and_cover_them():
    for rows in (0, 1, 15, 16, 17, 8192, 8193, 10**6, 2**31):
        length = columns.chunk_length(rows, 16, 512)
        assert length % 16 == 0 and triton.cdiv(rows, length) <= 512
        assert length == 16 or triton.cdiv(rows, length) > 256


@pytest.mark.parametrize("chunks", [0, 1, 127, 128, 300])
@pytest.mark.parametrize("sums", [1, 2, 3])
def test_chunks_are_added_up(sums, chunks):
    workspace = torch.randint(-9, 10, (sums, chunks, 37)).float()
    outs = [torch.full((37,), float("nan")) for _ in range(sums)]
    columns.add_chunks(workspace, *outs)
    assert torch.equal(torch.stack(outs), workspace.sum(1))


class Caught:
    """Stands for a kernel: keeps the grid of each launch."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.grids.append(grid)


@pytest.fixture
def grids(monkeypatch):
    """The grids of all launches of row kernels, none of which runs."""
    found = []
    for module in (gelu, norm, embedding, columns):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Caught(found))
    return found


def launch_everything(tokens, hidden, dtype, device):
    """Every launcher of the row ops, forward and backward, with dropout."""
    x, vector = torch.empty(tokens, hidden, dtype=dtype, device=device), torch.empty(hidden, dtype=dtype, device=device)
    row, seed = torch.empty(tokens, device=device), torch.empty(1, dtype=torch.int64, device=device)
    ids = (torch.empty(tokens, dtype=torch.int64, device=device),) * 3
    tables = [torch.empty(n, hidden, dtype=dtype, device=device) for n in (70, 50, 2)] + [vector, vector]
    gelu.bias_gelu_fwd(x, vector, "none")
    gelu.bias_gelu_bwd(x, x, vector, "none")
    norm.residual_layer_norm_fwd(x, x, vector, vector, vector, EPS, 0.1, seed, True)
    norm.residual_layer_norm_bwd(x, x, x, vector, vector, row, row, EPS, 0.1, seed)
    embedding.embed_layer_norm_fwd(ids, tables, EPS, 0.1, seed, True)
    embedding.embed_layer_norm_bwd(x, ids, tables, row, row, EPS, 0.1, seed)


@pytest.mark.parametrize("tokens", [0, 1, 8192, 50_000_000])
@pytest.mark.parametrize("hidden", [1, 768, 4096])
def test_grids_are_not_larger_than_a_gpu_takes(grids, tokens, hidden):
    # Tensors without memory: launchers that wait for what is in them would fail.
    launch_everything(tokens, hidden, torch.bfloat16, "meta")
    assert len(grids) == 11
    assert all(x < 2**31 and all(y < 2**16 for y in rest) for x, *rest in grids)


def test_a_gpu_is_filled_once(grids):
    with hardware.pretend(80, 108):
        norm.residual_layer_norm_fwd(*torch.empty(2, 9999, 768, device="meta"), *[None] * 3, EPS, 0.0, None, False)
    assert grids == [(108 * 6,)]


class Addresses:
    """Stands for memory: what is loaded is a given number, and the addresses are kept."""

    def __init__(self, monkeypatch, program, ids):
        self.program, self.ids, self.touched = program, ids, {}
        monkeypatch.setattr(interpreter.Builder, "create_get_program_id", self.program_id)
        monkeypatch.setattr(interpreter.Builder, "create_masked_load", self.load)
        monkeypatch.setattr(interpreter.Builder, "create_masked_store", self.store)

    def program_id(self, axis):
        return interpreter.Handle(np.array([self.program if axis == 0 else 0], np.int32), tl.int32)

    def touch(self, pointer, mask):
        mask = True if mask is None else mask.data
        addresses = pointer.data[np.broadcast_to(mask, pointer.data.shape)]
        if addresses.size:
            argument = pointer.attr["argument"]
            size = pointer.get_element_ty().primitive_bitwidth // 8
            first, last = self.touched.get(argument.name, (2**62, -(2**62)))
            places = (addresses.astype(np.int64) - argument.start) // size
            self.touched[argument.name] = min(first, int(places.min())), max(last, int(places.max()))

    def load(self, pointer, mask, *rest):
        self.touch(pointer, mask)
        kind = pointer.get_element_ty()
        value = self.ids if kind == tl.int64 else 0
        return interpreter.Handle(np.full(pointer.data.shape, value, stock_dtype(kind)), kind)

    def store(self, pointer, value, mask, *rest):
        self.touch(pointer, mask)


def stock_dtype(kind):
    return interpreter.stock._get_np_dtype(kind)


def test_offsets_beyond_two_to_the_31(monkeypatch):
    # The last program of each kernel, over tensors that would have 2^33 elements: it must touch their last ones.
    rows, hidden, id = 2**23, 1024, 2**22 + 5
    x, row, ids, seed = (torch.empty(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.int64, torch.int64))
    block, settings = norm.tile(hidden), {"COLUMNS": hidden, "BLOCK_ROWS": 2, "BLOCK": hidden}
    assert block.rows == 2
    last = rows * hidden - 1

    def touched(kernel, *args, program, **kwargs):
        addresses = Addresses(monkeypatch, program, id)
        # So many programs that the kernels that go on with other tiles do not.
        monkeypatch.setattr(interpreter.Builder, "create_get_num_programs", lambda self, axis: _number(2**30, tl.int32))
        kernel[(1,)](*args, **kwargs)
        monkeypatch.undo()
        return addresses.touched

    tile = {"COLUMNS": hidden, "TANH": False, "PRECISE": False, "BLOCK_ROWS": 8, "BLOCK_COLUMNS": 256}
    program = rows // 8 * (hidden // 256) - 1
    found = touched(gelu._bias_gelu_fwd_kernel, x, x, x.clone(), rows, **tile, program=program)
    assert found["out"][1] == last
    found = touched(
        gelu._bias_gelu_bwd_kernel, x, x.clone(), x.clone(), x.clone(), row, rows, 32, **tile, program=rows // 8 - 1
    )
    assert found["dout"][1] == found["x"][1] == found["dx"][1] == last

    tensors = [x.clone() for _ in range(5)]
    found = touched(
        norm._residual_layer_norm_fwd_kernel,
        *(*tensors, seed, x, row, row.clone(), rows, EPS, 0, 1.0),
        **settings,
        program=rows // 2 - 1,
    )
    assert all(found[name][1] == last for name in ("x", "residual", "out")) and found["mean"][1] == rows - 1
    tensors = [x.clone() for _ in range(5)]
    found = touched(
        norm._residual_layer_norm_bwd_kernel,
        *(*tensors, row, row.clone(), seed, x, x.clone(), row.clone(), rows, 16, 0, 1.0),
        **settings,
        program=rows // 16 - 1,
    )
    assert all(found[name][1] == last for name in ("dout", "x", "residual", "dx", "dresidual"))

    counts, tensors = (rows, rows, rows), [ids, ids.clone(), ids.clone(), *(x.clone() for _ in range(5))]
    of_id = id * hidden, (id + 1) * hidden - 1
    found = touched(
        embedding._embed_layer_norm_fwd_kernel,
        *(*tensors, seed, x, row, row.clone(), rows, *counts, EPS, 0, 1.0),
        **settings,
        program=rows // 2 - 1,
    )
    assert found["out"][1] == last and all(found[name] == of_id for name in ("word", "position", "token_type"))
    found = touched(
        embedding._embed_layer_norm_bwd_kernel,
        *(x.clone(), *tensors[:7], row, row.clone(), seed, row.clone(), row.clone(), rows, 16, *counts, 0, 1.0),
        **settings,
        program=rows // 16 - 1,
    )
    assert found["dout"][1] == found["dx"][1] == last
    assert all(found[name] == of_id for name in ("word", "position", "token_type"))

    shape = {"COLUMNS": hidden, "CHUNK": 16, "BLOCK": 256}
    gradients, last_piece = [x.clone() for _ in range(3)], hidden // 256 - 1
    found = touched(
        embedding._add_runs_kernel,
        *(ids, ids.clone(), row, *gradients, row.clone(), 12, *counts),
        **shape,
        program=last_piece,
    )
    assert found["dx"][1] == found["word"][1] == of_id[1]


def _number(value, kind):
    return interpreter.Handle(np.array([value], stock_dtype(kind)), kind)


def moved(launches, name):
    (launch,) = [launch for launch in launches if launch.kernel == name]
    return sum(launch.loaded.values()) + sum(launch.stored.values())


def test_bytes_are_few():
    """At most 1.2 times each tensor once: enough rows for what belongs to the columns to count little."""
    rows, hidden, seed = 96, 1024, torch.tensor([3])
    x, residual, dout = torch.randn(3, rows, hidden, dtype=torch.bfloat16)
    weight, bias, x_bias = torch.randn(3, hidden, dtype=torch.bfloat16)
    matrix = rows * hidden * 2
    with hardware.pretend(90, 1), interpreter.launches() as launches:
        _, mean, rstd = norm.residual_layer_norm_fwd(x, residual, weight, bias, x_bias, EPS, 0.1, seed, True)
        norm.residual_layer_norm_bwd(dout, x, residual, weight, x_bias, mean, rstd, EPS, 0.1, seed)
        gelu.bias_gelu_fwd(x, bias, "none")
        gelu.bias_gelu_bwd(dout, x, bias, "none")
    assert moved(launches, "_residual_layer_norm_fwd_kernel") <= 1.2 * 3 * matrix
    assert moved(launches, "_residual_layer_norm_bwd_kernel") <= 1.2 * 5 * matrix
    assert moved(launches, "_bias_gelu_fwd_kernel") <= 1.2 * 2 * matrix
    assert moved(launches, "_bias_gelu_bwd_kernel") <= 1.2 * 3 * matrix
    assert all(not launch.atomic for launch in launches)


def test_bytes_of_embeddings_are_few():
    tokens, hidden = 60, 256
    ids = torch.randint(40, (tokens,)), torch.arange(tokens), torch.randint(2, (tokens,))
    tables = [torch.randn(n, hidden) for n in (40, tokens, 2)] + [torch.randn(hidden), torch.randn(hidden)]
    row = hidden * 4
    with hardware.pretend(90, 1), interpreter.launches() as launches:
        _, mean, rstd = embedding.embed_layer_norm_fwd(ids, tables, EPS, 0.0, None, True)
        embedding.embed_layer_norm_bwd(torch.randn(tokens, hidden), ids, tables, mean, rstd, EPS, 0.0, None)
    assert moved(launches, "_embed_layer_norm_fwd_kernel") <= 1.4 * 4 * tokens * row  # few tokens to a program here
    assert moved(launches, "_embed_layer_norm_bwd_kernel") <= 1.2 * 5 * tokens * row
    (runs,) = [launch for launch in launches if launch.kernel == "_add_runs_kernel"]
    # Each of the three tables reads every token's row once, and writes the rows it has; a few go to the workspace.
    written = (len(ids[0].unique()) + tokens + 2) * row
    assert runs.loaded["dx"] == 3 * tokens * row
    stored = sum(runs.stored.values())
    assert stored <= written + 3 * 2 * 4 * row
    assert all(not launch.atomic for launch in launches)


def test_same_bits_on_every_gpu():
    rows, hidden = 37, 40
    x, residual = torch.randn(2, rows, hidden)
    weight, bias = torch.randn(2, hidden)
    ids = torch.randint(3, (rows,)), torch.arange(rows), torch.randint(2, (rows,))
    tables = [torch.randn(n, hidden) for n in (3, rows, 2)]

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias, *tables)]
        x_, residual_, weight_, bias_, *tables_ = leaves
        drop = {"dropout_p": 0.1, "seed": torch.tensor([3])}
        outs = [
            bias_gelu(x_, bias_),
            residual_layer_norm(x_, residual_, weight_, bias_, x_bias=bias_, **drop),
            embed_layer_norm(*ids, *tables_, weight_, bias_, **drop),
        ]
        return [*outs, *torch.autograd.grad([o.float().square().sum() for o in outs], leaves)]

    with backend.use("triton"):
        first, again = run(), run()
        with hardware.pretend(80, 1):
            smaller = run()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, smaller, strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    x, residual = torch.randn(2, 7, 200)
    weight, bias = torch.randn(2, 200)
    with backend.use("triton"):
        together = residual_layer_norm(x, residual, weight, bias)
        alone = [residual_layer_norm(x[i : i + 1], residual[i : i + 1], weight, bias) for i in range(7)]
    assert torch.equal(together, torch.cat(alone))
