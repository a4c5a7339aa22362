"""embed_layer_norm against the reference in float64."""

import parity
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bertfast import reference
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_parity_in_both_directions(implementation, shape, dtype, p):
    ids, seed = make_ids(shape[0]), torch.tensor([77]) if p else None
    parity.check_gradients(
        lambda *tables: embed_layer_norm(*ids, *tables, EPS, dropout_p=p, seed=seed),
        lambda *tables: reference.embed_layer_norm(*ids, *tables, EPS, p, seed),
        lambda *tables: plain(ids, tables, p, seed),
        make_tables(shape[1], dtype),
        NAMES,
        rows=shape[0],
    )


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
    kept = torch.autograd.grad(embed_layer_norm(*ids, *tables, padding_idx=3), tables, dout)
    assert every[0][3].abs().sum() > 0 and kept[0][3].abs().sum() == 0
    every[0][3] = 0
    assert all(torch.equal(a, b) for a, b in zip(every, kept, strict=True))


def test_same_bits_whatever_the_threads(native_implementation):
    ids, tables = make_ids(500), [t.requires_grad_() for t in make_tables(96, torch.float32)]

    def run():
        out = embed_layer_norm(*ids, *tables)
        return [out, *torch.autograd.grad(out.square().sum(), tables)]

    parity.check_threads(run)


def test_opcheck(implementation):
    ids, tables = make_ids(6), [t.requires_grad_() for t in make_tables(24, torch.float32)]
    opcheck(torch.ops.bertfast.embed_layer_norm, (*ids, *tables, EPS, -1, 0.0, None))
    opcheck(torch.ops.bertfast.embed_layer_norm, (*ids[:2], None, *tables, EPS, 3, 0.2, torch.tensor([1])))


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
