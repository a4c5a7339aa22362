"""embed_layer_norm: the sum of word, position and token-type embeddings, normalised, for the valid tokens only."""

import torch
from torch import Tensor

from bertfast import backend, reference
from bertfast.ops import cpu, registry


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
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

    Args:
        input_ids, position_ids, token_type_ids: (tokens,) int64; token_type_ids None means 0 everywhere.
        word, position, token_type: the tables, (vocabulary | positions | types, hidden), one dtype and device.
        weight, bias: (hidden,) of the norm, same dtype.
        eps: added to the variance.
        dropout_p, seed: as in `residual_layer_norm`.

    Returns (tokens, hidden) in the tables' dtype; the sum and the statistics are float32. Raises IndexError that
    names the first id outside its table (on the CPU; a GPU cannot say without waiting), ValueError / TypeError
    where shapes, dtypes or devices do not fit. Source: Devlin et al. 2019, figure 2.
    """
    hidden = word.shape[1:]
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is None:
            continue
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
    arguments = (
        input_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        eps,
        dropout_p,
        seed,
    )
    if registry.seen(word, position, token_type, weight, bias, input_ids):
        return _op(*arguments)[0]
    forward, _ = backend.implementation("embed_layer_norm", word)
    return forward(*arguments, False)[0]


def _raise_outside(input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, *tables: Tensor) -> None:
    """IndexError that names the first id outside its table, if there is one."""
    names = ("token id", "position", "token type")
    for name, ids, table in zip(names, (input_ids, position_ids, token_type_ids), tables, strict=True):
        outside = [] if ids is None else ((ids < 0) | (ids >= table.shape[0])).nonzero()
        if len(outside):
            token = int(outside[0])
            raise IndexError(
                f"{name} {int(ids[token])} (token {token} of the batch) is outside the table of {table.shape[0]}: "
                "is this the tokenizer, and the maximum length, of this model?"
            )


def _cpu_forward(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, dropout_p, seed, save
):
    tensors = registry.dense(input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias)
    tokens, hidden = input_ids.shape[0], word.shape[1]
    out, mean, rstd = word.new_empty(tokens, hidden), *cpu.statistics(tokens, save)
    sizes = (tokens, hidden, word.shape[0], position.shape[0], token_type.shape[0])
    arguments = (*tensors, out, mean, rstd, *sizes, eps, *cpu.dropout(dropout_p, seed))
    outside = cpu.launch("embed_layer_norm_fwd", word.dtype, *arguments)
    if outside >= 0:
        _raise_outside(input_ids, position_ids, token_type_ids, word, position, token_type)
    return out, mean, rstd


def _cpu_backward(
    dout,
    input_ids,
    position_ids,
    token_type_ids,
    word,
    position,
    token_type,
    weight,
    bias,
    mean,
    rstd,
    eps,
    dropout_p,
    seed,
):
    dout, *tensors = registry.dense(
        dout, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias
    )
    gradients = [torch.empty_like(t) for t in tensors[3:]]
    sizes = (*dout.shape, word.shape[0], position.shape[0], token_type.shape[0])
    arguments = (dout, *tensors, mean, rstd, *gradients, *sizes, *cpu.dropout(dropout_p, seed))
    cpu.launch("embed_layer_norm_bwd", word.dtype, *arguments)
    return tuple(gradients)


def _reference_forward(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, dropout_p, seed, save
):
    if word.device.type == "cpu":
        _raise_outside(input_ids, position_ids, token_type_ids, word, position, token_type)
    out = reference.embed_layer_norm(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, dropout_p, seed
    )
    # The reference's backward computes everything anew; the statistics only keep the op's signature.
    tokens = input_ids.shape[0]
    return out, word.new_zeros(tokens, dtype=torch.float32), word.new_zeros(tokens, dtype=torch.float32)


def _reference_backward(
    dout,
    input_ids,
    position_ids,
    token_type_ids,
    word,
    position,
    token_type,
    weight,
    bias,
    mean,
    rstd,
    eps,
    dropout_p,
    seed,
):
    tensors = (dout, input_ids, position_ids, token_type_ids, word, position, token_type, weight)
    return tuple(reference.embed_layer_norm_backward(*tensors, eps, dropout_p, seed))


backend.register("embed_layer_norm", "cpu", (_cpu_forward, _cpu_backward))
backend.register("embed_layer_norm", "reference", (_reference_forward, _reference_backward))


def _run(*arguments):
    forward, _ = backend.implementation("embed_layer_norm", arguments[3])
    return forward(*arguments, True)


def _fake(input_ids, position_ids, token_type_ids, word, *rest):
    mean = word.new_empty(input_ids.shape[0], dtype=torch.float32)
    return word.new_empty(input_ids.shape[0], word.shape[1]), mean, torch.empty_like(mean)


def _run_backward(*arguments):
    _, backward = backend.implementation("embed_layer_norm", arguments[4])
    return backward(*arguments)


def _fake_backward(dout, input_ids, position_ids, token_type_ids, *tensors_and_rest):
    return tuple(torch.empty_like(t) for t in tensors_and_rest[:5])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.dropout_p, seed = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tensors, mean, rstd, seed)


def _autograd(ctx, dout, dmean, drstd):
    *saved, seed = ctx.saved_tensors
    gradients = _op_backward(dout, *saved, ctx.eps, ctx.dropout_p, seed)
    return None, None, None, *gradients, None, None, None


_TABLES = "Tensor word, Tensor position, Tensor token_type, Tensor weight, Tensor bias"
_op_backward = registry.define(
    "embed_layer_norm_backward(Tensor dout, Tensor input_ids, Tensor position_ids, Tensor? token_type_ids,"
    f" {_TABLES}, Tensor mean, Tensor rstd, float eps, float dropout_p, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_op = registry.define(
    "embed_layer_norm(Tensor input_ids, Tensor position_ids, Tensor? token_type_ids,"
    f" {_TABLES}, float eps, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _autograd,
)
