"""embed_layer_norm: the sum of word, position and token-type embeddings, normalised, for the valid tokens only."""

import torch
from torch import Tensor

from bertfast import backend, reference
from bertfast.ops import cpu, cuda, registry
from bertfast.ops.norm import refuse_wide_rows


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

    Args:
        input_ids, position_ids, token_type_ids: (tokens,) int64; token_type_ids None means 0 everywhere.
        word, position, token_type: the tables, (vocabulary | positions | types, hidden), one dtype and device.
        weight, bias: (hidden,) of the norm, same dtype.
        eps: added to the variance.
        padding_idx, position_padding_idx: the row of `word`, and of `position`, that gets no gradient, as in
            torch.nn.Embedding; None where all rows do.
        dropout_p, seed: as in `residual_layer_norm`.

    Returns (tokens, hidden) in the tables' dtype; the sum and the statistics are float32. Raises IndexError that
    names the first id outside its table (on the CPU; a GPU cannot say without waiting, and its kernels give such a
    token NaN), ValueError / TypeError where shapes, dtypes or devices do not fit. Source: Devlin et al. 2019, figure 2.
    """
    for name, table in (("word", word), ("position", position), ("token_type", token_type)):
        registry.check_axes(name, table, "rows", "hidden")
    eps = registry.number("eps", eps)
    for name, row, table in (
        ("padding_idx", padding_idx, word),
        ("position_padding_idx", position_padding_idx, position),
    ):
        if row is not None and (not isinstance(row, int) or not 0 <= row < len(table)):
            raise ValueError(f"{name} must be one of the {len(table)} rows of its table or None, not {row!r}")
    hidden = word.shape[1:]
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is None and name == "token_type_ids":
            continue
        registry.check_tensor(name, ids)
        if ids.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, not {ids.dtype}: convert it with .long()")
        if ids.shape != input_ids.shape or ids.dim() != 1:
            raise ValueError(
                f"{name} must be (tokens,), one for each token: {tuple(input_ids.shape)} and {tuple(ids.shape)}"
            )
        if ids.device != word.device:
            raise ValueError(f"{name} is on {ids.device}, the tables on {word.device}: move one of them with .to()")
    registry.check_like(
        word,
        position=(position, (position.shape[0], *hidden)),
        token_type=(token_type, (token_type.shape[0], *hidden)),
        weight=(weight, hidden),
        bias=(bias, hidden),
    )
    dropout_p, seed = registry.dropout_arguments(dropout_p, seed, word.device)
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type, weight, bias)
    if registry.seen(*tables, input_ids):
        untrained = [-1 if i is None else i for i in (padding_idx, position_padding_idx)]
        return _op(*ids, *tables, eps, *untrained, dropout_p, seed)[0]
    forward, _ = backend.implementation("embed_layer_norm", word, word.shape[1])
    return forward(ids, tables, eps, dropout_p, seed, False)[0]


def _raise_outside(ids: tuple[Tensor | None, ...], tables: tuple[Tensor, ...]) -> None:
    """IndexError that names the first id outside its table, if there is one."""
    for name, i, table in zip(("token id", "position", "token type"), ids, tables[:3], strict=True):
        outside = [] if i is None else ((i < 0) | (i >= table.shape[0])).nonzero()
        if len(outside):
            token = int(outside[0])
            raise IndexError(
                f"{name} {int(i[token])} (token {token} of the batch) is outside the table of {table.shape[0]}: "
                "is this the tokenizer, and the maximum length, of this model?"
            )


def _cpu_forward(ids, tables, eps, dropout_p, seed, save):
    tensors = registry.dense(*ids, *tables)
    (tokens,), hidden = ids[0].shape, tables[0].shape[1]
    out, mean, rstd = tables[0].new_empty(tokens, hidden), *cpu.statistics(tokens, save)
    arguments = (*tensors, out, mean, rstd, tokens, hidden, *_rows(tables), eps, *cpu.dropout(dropout_p, seed))
    if cpu.launch("embed_layer_norm_fwd", out.dtype, *arguments) >= 0:
        _raise_outside(ids, tables)
    return out, mean, rstd


def _cpu_backward(dout, ids, tables, mean, rstd, eps, dropout_p, seed):
    dout, *tensors = registry.dense(dout, *ids, *tables)
    gradients = [torch.empty_like(t) for t in tensors[3:]]
    arguments = (dout, *tensors, mean, rstd, *gradients, *dout.shape, *_rows(tables), *cpu.dropout(dropout_p, seed))
    cpu.launch("embed_layer_norm_bwd", dout.dtype, *arguments)
    return gradients


def _cuda_forward(ids, tables, eps, dropout_p, seed, save):
    tensors = registry.dense(*ids, *tables)
    (tokens,), hidden = ids[0].shape, tables[0].shape[1]
    out, mean, rstd = tables[0].new_empty(tokens, hidden), *cuda.statistics(tables[0], tokens, save)
    arguments = (*tensors, out, mean, rstd, tokens, hidden, *_rows(tables), eps, *cuda.dropout(dropout_p, seed))
    cuda.launch("embed_layer_norm_fwd", out, *arguments)
    return out, mean, rstd


def _cuda_backward(dout, ids, tables, mean, rstd, eps, dropout_p, seed):
    dout, *tensors = registry.dense(dout, *ids, *tables)
    # The tokens of a row of a table stand together in the sorted ids, in an order that does not depend on the GPU.
    types = torch.zeros_like(ids[0]) if ids[2] is None else ids[2]
    sorted_ids, order = torch.stack((ids[0], ids[1], types)).sort(dim=1, stable=True)
    gradients = [*(torch.zeros_like(t) for t in tensors[3:6]), *(torch.empty_like(t) for t in tensors[6:])]
    cuda.launch(
        "embed_layer_norm_bwd",
        dout,
        *(dout, *tensors[:7], mean, rstd, sorted_ids, order, *gradients),
        *(torch.empty_like(dout, dtype=torch.float32), cuda.column_sums(dout, 8)),
        *(*dout.shape, *_rows(tables), *cuda.dropout(dropout_p, seed)),
    )
    return gradients


def _rows(tables: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(table.shape[0] for table in tables[:3])


def _reference_forward(ids, tables, eps, dropout_p, seed, save):
    if tables[0].device.type == "cpu":
        _raise_outside(ids, tables)
    out = reference.embed_layer_norm(*ids, *tables, eps, dropout_p, seed)
    if not save:
        return out, None, None
    return out, *reference.row_statistics(reference.embedding_sum(*ids, *tables[:3]), eps)


def _reference_backward(dout, ids, tables, mean, rstd, eps, dropout_p, seed):
    return reference.embed_layer_norm_backward(dout, *ids, *tables[:4], eps, dropout_p, seed)


backend.register("embed_layer_norm", "cuda", (_cuda_forward, _cuda_backward))
backend.register(
    "embed_layer_norm",
    "triton",
    backend.Later("bertfast.kernels.embedding", "embed_layer_norm_fwd", "embed_layer_norm_bwd"),
    refuse=refuse_wide_rows,
)
backend.register("embed_layer_norm", "cpu", (_cpu_forward, _cpu_backward))
backend.register("embed_layer_norm", "reference", (_reference_forward, _reference_backward))


def _run(*arguments):
    ids, tables, (eps, _, _, dropout_p, seed) = arguments[:3], arguments[3:8], arguments[8:]
    forward, _ = backend.implementation("embed_layer_norm", tables[0], tables[0].shape[1])
    return forward(ids, tables, eps, dropout_p, seed, True)


def _fake(input_ids, position_ids, token_type_ids, word, *rest):
    mean = word.new_empty(input_ids.shape[0], dtype=torch.float32)
    return word.new_empty(input_ids.shape[0], word.shape[1]), mean, torch.empty_like(mean)


def _run_backward(dout, *arguments):
    ids, tables, (mean, rstd, eps, *untrained, dropout_p, seed) = arguments[:3], arguments[3:8], arguments[8:]
    _, backward = backend.implementation("embed_layer_norm", tables[0], tables[0].shape[1])
    gradients = backward(dout, ids, tables, mean, rstd, eps, dropout_p, seed)
    for gradient, row in zip(gradients, untrained, strict=False):
        if row >= 0:
            gradient[row].zero_()
    return tuple(gradients)


def _fake_backward(dout, input_ids, position_ids, token_type_ids, *tensors_and_rest):
    return tuple(torch.empty_like(t) for t in tensors_and_rest[:5])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.padding_idx, ctx.position_padding_idx, ctx.dropout_p, seed = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tensors, mean, rstd, seed)


def _autograd(ctx, dout, dmean, drstd):
    *saved, seed = ctx.saved_tensors
    settings = ctx.eps, ctx.padding_idx, ctx.position_padding_idx, ctx.dropout_p
    gradients = _op_backward(dout, *saved, *settings, seed)
    return None, None, None, *gradients, None, None, None, None, None


_INPUTS = (
    "Tensor input_ids, Tensor position_ids, Tensor? token_type_ids,"
    " Tensor word, Tensor position, Tensor token_type, Tensor weight, Tensor bias"
)
_SETTINGS = "float eps, int padding_idx, int position_padding_idx, float dropout_p, Tensor? seed"
_op_backward = registry.define(
    f"embed_layer_norm_backward(Tensor dout, {_INPUTS}, Tensor mean, Tensor rstd, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_op = registry.define(
    f"embed_layer_norm({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _autograd,
)
