"""embed_layer_norm against the reference in float64."""

import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bertfast import backend, reference
from bertfast.ops import embed_layer_norm

EPS = 1e-12
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 64), (1, 768), (7, 17), (70, 312), (300, 384)]
NAMES = ("word", "position", "token_type", "weight", "bias")


def make_ids(tokens, vocabulary=50, positions=40, types=2):
    # Half of all tokens share one id, as [PAD], [SEP] or "the" do: their gradients meet in one row.
    ids = torch.randint(vocabulary, (tokens,))
    ids[::2] = 3
    return ids, torch.randint(positions, (tokens,)), torch.randint(types, (tokens,))


def make_tables(hidden, dtype, vocabulary=50, positions=40, types=2):
    tables = [torch.randn(n, hidden, dtype=dtype) for n in (vocabulary, positions, types)]
    return [*tables, 1 + torch.randn(hidden, dtype=dtype) / 2, torch.randn(hidden, dtype=dtype)]


def plain(ids, tables, p=0.0, seed=None):
    word, position, token_type, weight, bias = tables
    rows = [F.embedding(i, t) for i, t in zip(ids, (word, position, token_type), strict=True)]
    return reference.dropout(F.layer_norm(rows[0] + rows[2] + rows[1], weight.shape, weight, bias, EPS), p, seed)


def check_parity(shape, dtype, p, device="cpu", change=lambda table: table):
    ids, seed = [i.to(device) for i in make_ids(shape[0])], torch.tensor([77], device=device) if p else None
    parity.check_gradients(
        lambda *tables: embed_layer_norm(*ids, *map(change, tables), EPS, dropout_p=p, seed=seed),
        lambda *tables: reference.embed_layer_norm(*ids, *tables, EPS, p, seed),
        lambda *tables: plain(ids, tables, p, seed),
        [t.to(device) for t in make_tables(shape[1], dtype)],
        NAMES,
        rows=shape[0],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_parity_in_both_directions(implementation, shape, dtype, p):
    if implementation == "triton":
        shape = min(shape[0], 35), shape[1]  # an interpreter goes through every token
    check_parity(shape, dtype, p)


@pytest.mark.parametrize("shape", [(40, 800), (7, 4104)])  # rows of several warps, and of two pieces
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_parity_of_wide_rows_on_cuda(cuda_device, shape, p):
    check_parity(shape, torch.bfloat16, p, cuda_device)


def test_parity_of_many_tokens_on_cuda(cuda_device):  # more than the shortest chunks have room for
    check_parity((8300, 8), torch.float32, 0.0, cuda_device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_parity_of_float16_on_cuda(cuda_device, shape, p):
    check_parity(shape, torch.float16, p, cuda_device)


@pytest.mark.parametrize("shape", [(7, 17), (40, 96)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_parity_of_float16_in_triton(triton_device, shape, p):
    check_parity(shape, torch.float16, p, triton_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (20000, 768)])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_parity_on_the_gpu(kernels, shape, dtype, p):
    with backend.use(kernels):
        check_parity(shape, dtype, p, "cuda")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_addresses_that_are_not_aligned_on_cuda(cuda_device, dtype):
    check_parity((70, 96), dtype, 0.1, cuda_device, parity.misaligned)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("hidden", [24, 33, 1000])
def test_masks_on_cuda_are_those_of_the_reference(cuda_device, hidden, dtype):
    seed, p = torch.tensor([-0x123456789ABCDEF], device=cuda_device), 0.3
    ids, tables = ([t.to(cuda_device) for t in made] for made in (make_ids(35), make_tables(hidden, dtype)))
    kept = embed_layer_norm(*ids, *tables)
    out = embed_layer_norm(*ids, *tables, dropout_p=p, seed=seed)
    mask = reference.dropout(torch.ones_like(out), p, seed) == 0
    assert torch.equal((out == 0) & (kept != 0), mask & (kept != 0))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_addresses_that_are_not_aligned_in_triton(triton_device, dtype):
    check_parity((20, 96), dtype, 0.1, triton_device, parity.misaligned)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("hidden", [24, 33, 1000])
def test_masks_in_triton_are_those_of_the_reference(triton_device, hidden, dtype):
    test_masks_on_cuda_are_those_of_the_reference(triton_device, hidden, dtype)


RUNS = {
    "one id": [3] * 700,  # more chunks than the last kernel adds at a time
    "no id twice": list(range(40)),
    "as long as a chunk": [i // 16 for i in range(64)],
    "a chunk and one": [i // 17 for i in range(70)],
    "from the middle of a chunk": [0] * 5 + [1] * 40 + [2] * 3 + [4] * 50,
    "outside the table": [-(2**60)] * 20 + [-1] * 3 + [0] * 30 + [49] + [50] * 40 + [2**60] * 2,
    "no token": [],
}


@pytest.mark.parametrize("ids", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("hidden", [8, 300])
def test_sums_over_the_tokens_of_a_row_in_triton(triton_device, ids, hidden):
    kernels = pytest.importorskip("bertfast.kernels.embedding")
    if hidden == 300:
        ids = ids[:100]
    ids = torch.tensor(ids, dtype=torch.int64, device=triton_device)
    ids = ids[torch.randperm(len(ids), device=triton_device)]
    dx = torch.randint(-9, 10, (len(ids), hidden), device=triton_device).float()  # sums are exact in any order
    gradients = [torch.zeros(rows, hidden, device=triton_device) for rows in (50, 60, 3)]
    kernels._add_to_tables(dx, (ids, ids.clamp(0, 59), ids % 3), gradients)
    inside = (ids >= 0) & (ids < 50)
    expected = [torch.zeros_like(g) for g in gradients]
    for table, i, tokens in zip(expected, (ids[inside], ids.clamp(0, 59), ids % 3), (dx[inside], dx, dx), strict=True):
        table.index_add_(0, i, tokens)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [-1, 50, 2**60])
def test_ids_outside_their_table_give_nan_in_triton(triton_device, which, value):
    test_ids_outside_their_table_give_nan_on_cuda(triton_device, which, value)


def test_same_bits_in_any_schedule(cuda_on_the_host):
    ids, tables = make_ids(150), [t.requires_grad_() for t in make_tables(300, torch.float32)]

    def run():
        out = embed_layer_norm(*ids, *tables, dropout_p=0.1, seed=torch.tensor([8]))
        return [out, *torch.autograd.grad(out.square().sum(), tables)]

    parity.check_schedules(run)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [-1, 50, 2**60])
def test_ids_outside_their_table_give_nan_on_cuda(cuda_device, which, value):
    ids, tables = ([t.to(cuda_device) for t in made] for made in (make_ids(8), make_tables(16, torch.float32)))
    leaves = [t.requires_grad_() for t in tables]
    right = embed_layer_norm(*ids, *leaves)
    ids[which][5] = value
    out = embed_layer_norm(*ids, *leaves)
    others = [0, 1, 2, 3, 4, 6, 7]
    assert out[5].isnan().all() and torch.equal(out[others], right[others])
    *table_gradients, _, dbias = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert table_gradients[which].isfinite().all() and dbias.isfinite().all()  # nothing is added to a row at the edge
    assert all(table_gradients[i][ids[i][5]].isnan().all() for i in range(3) if i != which)


def test_no_token_types_means_type_zero(implementation):
    ids, positions, types = make_ids(9)
    tables = make_tables(24, torch.float32)
    zero = embed_layer_norm(ids, positions, torch.zeros_like(types), *tables)
    assert torch.equal(embed_layer_norm(ids, positions, None, *tables), zero)
    leaves = [t.requires_grad_() for t in tables]
    embed_layer_norm(ids, positions, None, *leaves).square().sum().backward()
    assert leaves[2].grad[0].abs().sum() > 0 and leaves[2].grad[1].abs().sum() == 0


def test_the_padding_token_is_not_trained(implementation):
    ids, tables = make_ids(9), [t.requires_grad_() for t in make_tables(24, torch.float32)]
    dout = torch.randn(9, 24)
    every = torch.autograd.grad(embed_layer_norm(*ids, *tables), tables, dout)
    position = int(ids[1][2])
    untrained = {"padding_idx": 3, "position_padding_idx": position}
    kept = torch.autograd.grad(embed_layer_norm(*ids, *tables, **untrained), tables, dout)
    for gradient, less, row in zip(every, kept, (3, position), strict=False):
        assert gradient[row].abs().sum() > 0 and less[row].abs().sum() == 0
        gradient[row] = 0
    assert all(torch.equal(a, b) for a, b in zip(every, kept, strict=True))


def test_same_bits_whatever_the_threads(native_implementation):
    if native_implementation == "triton":
        pytest.skip("has no threads: test_kernels.py")
    ids, tables = make_ids(500), [t.requires_grad_() for t in make_tables(96, torch.float32)]

    def run():
        out = embed_layer_norm(*ids, *tables)
        return [out, *torch.autograd.grad(out.square().sum(), tables)]

    parity.check_threads(run)


def test_opcheck(implementation):
    ids, tables = make_ids(6), [t.requires_grad_() for t in make_tables(24, torch.float32)]
    opcheck(torch.ops.bertfast.embed_layer_norm, (*ids, *tables, EPS, -1, -1, 0.0, None))
    opcheck(torch.ops.bertfast.embed_layer_norm, (*ids[:2], None, *tables, EPS, 3, 1, 0.2, torch.tensor([1])))


def test_gradients_of_the_reference():
    ids, tables = make_ids(5), [t.requires_grad_() for t in make_tables(4, torch.float64, 6, 40, 2)]
    ids[0].clamp_(max=5)
    arguments = EPS, 0.2, torch.tensor([4])
    assert torch.autograd.gradcheck(lambda *t: reference.embed_layer_norm(*ids, *t, *arguments), tables)
    out = reference.embed_layer_norm(*ids, *tables, *arguments)
    dout = torch.randn_like(out)
    spelled_out = reference.embed_layer_norm_backward(dout, *ids, *(t.detach() for t in tables[:4]), *arguments)
    torch.testing.assert_close(spelled_out, list(torch.autograd.grad(out, tables, dout)))


def test_compiles_whole_and_once_for_all_lengths(compiles_once):
    tables = make_tables(48, torch.float32)
    compiles_once(lambda rows: [*make_ids(rows), *tables], embed_layer_norm)


@pytest.mark.parametrize(("which", "what"), [(0, "token id"), (1, "position"), (2, "token type")])
@pytest.mark.parametrize("value", [-1, 50])
def test_ids_outside_their_table_are_named(implementation, which, what, value):
    if implementation in ("cuda-host", "triton"):
        pytest.skip("a GPU cannot say without waiting: test_ids_outside_their_table_give_nan_on_cuda")
    ids, tables = make_ids(8), make_tables(16, torch.float32)
    ids[which][5] = value
    with pytest.raises(IndexError, match=rf"{what} {value} \(token 5 of the batch\)"):
        embed_layer_norm(*ids, *tables)


def test_bad_input():
    (ids, positions, types), tables = make_ids(8), make_tables(16, torch.float32)
    with pytest.raises(TypeError, match=r"int64, not torch.int32"):
        embed_layer_norm(ids.int(), positions, types, *tables)
    with pytest.raises(ValueError, match="one for each token"):
        embed_layer_norm(ids, positions[:3], types, *tables)
    with pytest.raises(ValueError, match="the tables on meta"):
        embed_layer_norm(ids, positions, types, *(t.to("meta") for t in tables))
    with pytest.raises(ValueError, match="position has shape"):
        embed_layer_norm(ids, positions, types, tables[0], tables[1][:, :8], *tables[2:])
