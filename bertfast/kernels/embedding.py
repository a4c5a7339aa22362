"""embed_layer_norm: out = dropout(LayerNorm(word[ids] + position[position_ids] + type[token_type_ids])), and its
gradients.

The forward is that of norm.py, over rows that it looks up. The backward has two steps, neither with atomics. First,
chunks of tokens: the gradient of each token's sum, as float32 rows, and the sums over the tokens that weight and bias
need. Then each row of a table gets the sum over its tokens. They stand together, as a run, where the ids are sorted;
the sorted tokens are cut into chunks, and each program adds up the runs of its chunk. A run that lies in several
chunks, as the token types' do, leaves its parts in a workspace, and another kernel adds them in their order.

An id outside its table gives the token NaN, and is no row's gradient.
"""

import torch
import triton
import triton.language as tl

from bertfast.kernels import columns, dropout, norm
from bertfast.ops import registry

CHUNK = 16  # sorted tokens to a program
RUN_COLUMNS, RUN_WARPS = 256, 2
JOIN_CHUNKS, JOIN_COLUMNS, JOIN_WARPS = 32, 128, 4


@triton.jit
def _look_up(table, rows, ids, begin, row, exists, column, COLUMNS: tl.constexpr):
    """(rows, BLOCK) float32: the rows table[ids[begin + row]], and which ids the table has. No ids mean 0."""
    i = tl.zeros_like(row).to(tl.int64) if ids is None else tl.load(ids + begin + row, mask=exists, other=0)
    known = (i >= 0) & (i < rows)
    mask = (exists & known)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(table + i[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32), known


@triton.jit(do_not_specialize=["tokens", "vocabulary", "positions", "types", "threshold"])
def _embed_layer_norm_fwd_kernel(
    input_ids,  # (tokens,) int64
    position_ids,  # (tokens,) int64
    token_type_ids,  # (tokens,) int64, or None where all are 0
    word,  # (vocabulary, COLUMNS)
    position,  # (positions, COLUMNS)
    token_type,  # (types, COLUMNS)
    weight,  # (COLUMNS,)
    bias,  # (COLUMNS,)
    seed,  # (1,) int64, or None where nothing is dropped
    out,  # (tokens, COLUMNS)
    mean,  # (tokens,) float32, or None where the backward will not want them
    rstd,
    tokens,
    vocabulary,
    positions,
    types,
    eps,
    threshold,  # of dropout, and what the kept elements are multiplied by
    scale,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    place = row[:, None] * COLUMNS + column[None, :]
    gamma, beta = norm.load_vector(weight, column, COLUMNS), norm.load_vector(bias, column, COLUMNS)
    if seed is not None:
        key = tl.load(seed)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_ROWS), tl.num_programs(0)):
        begin = tl.cast(tile, tl.int64) * BLOCK_ROWS
        exists = row < tokens - begin
        y, known_id = _look_up(word, vocabulary, input_ids, begin, row, exists, column, COLUMNS)
        t, known_type = _look_up(token_type, types, token_type_ids, begin, row, exists, column, COLUMNS)
        p, known_position = _look_up(position, positions, position_ids, begin, row, exists, column, COLUMNS)
        xhat, m, s = norm.normalise(y + t + p, column, eps, COLUMNS)
        lost = tl.where(known_id & known_type & known_position, 0.0, float("nan"))
        y = xhat * gamma + (beta + lost[:, None])
        if seed is not None:
            y *= dropout.row_multiplier(
                key, threshold, scale, begin + row, BLOCK, 128 // word.dtype.element_ty.primitive_bitwidth
            )
        inside = exists[:, None] & (column < COLUMNS)[None, :]
        tl.store(out + begin * COLUMNS + place, y.to(out.dtype.element_ty), mask=inside)
        if mean is not None:
            tl.store(mean + begin + row, m, mask=exists)
            tl.store(rstd + begin + row, s + lost, mask=exists)


@triton.jit(do_not_specialize=["tokens", "length", "vocabulary", "positions", "types", "threshold"])
def _embed_layer_norm_bwd_kernel(
    dout,  # (tokens, COLUMNS)
    input_ids,  # (tokens,) int64
    position_ids,  # (tokens,) int64
    token_type_ids,  # (tokens,) int64, or None where all are 0
    word,  # (vocabulary, COLUMNS)
    position,  # (positions, COLUMNS)
    token_type,  # (types, COLUMNS)
    weight,  # (COLUMNS,)
    mean,  # (tokens,) float32
    rstd,  # (tokens,) float32
    seed,  # (1,) int64, or None where nothing is dropped
    dx,  # (tokens, COLUMNS) float32: the gradient of each token's sum
    workspace,  # (2, chunks, COLUMNS) float32: the sums of dweight and dbias
    tokens,
    length,  # the tokens of a chunk
    vocabulary,
    positions,
    types,
    threshold,  # of dropout, and what the kept elements are multiplied by
    scale,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    place = row[:, None] * COLUMNS + column[None, :]
    gamma = norm.load_vector(weight, column, COLUMNS)
    if seed is not None:
        key = tl.load(seed)
    dweight, dbias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    chunk = tl.program_id(0).to(tl.int64)
    for step in range(0, length, BLOCK_ROWS):
        begin = chunk * length + step
        exists = row < tokens - begin
        inside = exists[:, None] & (column < COLUMNS)[None, :]
        g = tl.load(dout + begin * COLUMNS + place, mask=inside, other=0.0).to(tl.float32)
        y, _ = _look_up(word, vocabulary, input_ids, begin, row, exists, column, COLUMNS)
        t, _ = _look_up(token_type, types, token_type_ids, begin, row, exists, column, COLUMNS)
        p, _ = _look_up(position, positions, position_ids, begin, row, exists, column, COLUMNS)
        m = tl.load(mean + begin + row, mask=exists, other=0.0)
        s = tl.load(rstd + begin + row, mask=exists, other=0.0)
        if seed is not None:
            g *= dropout.row_multiplier(
                key, threshold, scale, begin + row, BLOCK, 128 // word.dtype.element_ty.primitive_bitwidth
            )
        xhat = (y + t + p - m[:, None]) * s[:, None]
        dweight += tl.sum(g * xhat, 0)
        dbias += tl.sum(g, 0)
        dy = norm.normalise_backward(g * gamma, xhat, s, COLUMNS)
        tl.store(dx + begin * COLUMNS + place, dy, mask=inside)
    to = workspace + chunk * COLUMNS + column
    tl.store(to, dweight, mask=column < COLUMNS)
    tl.store(to + tl.num_programs(0).to(tl.int64) * COLUMNS, dbias, mask=column < COLUMNS)


@triton.jit
def _of_table(word, position, token_type, vocabulary, positions, types):
    """The gradient and the number of rows of the table that the program is for: the second axis of its grid."""
    gradient, rows = word, vocabulary
    if tl.program_id(1) == 1:
        gradient, rows = position, positions
    if tl.program_id(1) == 2:
        gradient, rows = token_type, types
    return gradient, rows


@triton.jit(do_not_specialize=["tokens", "vocabulary", "positions", "types"])
def _add_runs_kernel(
    ids,  # (3, tokens) int64, sorted: of words, positions and types
    order,  # (3, tokens) int64: the tokens that have them
    dx,  # (tokens, COLUMNS) float32
    word,  # (vocabulary, COLUMNS), the gradients
    position,  # (positions, COLUMNS)
    token_type,  # (types, COLUMNS)
    workspace,  # (3, 2, chunks, COLUMNS) float32: of a run from an earlier chunk, and of one that goes on after this
    tokens,
    vocabulary,
    positions,
    types,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    chunks, chunk = tl.num_programs(0) // across, tl.program_id(0) // across
    column = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    gradient, rows = _of_table(word, position, token_type, vocabulary, positions, types)
    which, inside = tl.program_id(1).to(tl.int64), column < COLUMNS
    ids += which * tokens
    begin = chunk.to(tl.int64) * CHUNK
    end = tl.minimum(begin + CHUNK, tokens)
    place = begin + tl.arange(0, CHUNK)
    exists = place < end
    id = tl.load(ids + place, mask=exists, other=0)
    token = tl.load(order + which * tokens + place, mask=exists, other=0)
    earlier = tl.load(ids + begin - 1, mask=begin > 0, other=0)
    later = tl.load(ids + end, mask=end < tokens, other=0)
    from_earlier = workspace + (which * 2 * chunks + chunk) * COLUMNS + column
    into_later = from_earlier + chunks.to(tl.int64) * COLUMNS
    first = begin
    while first < end:
        this = tl.load(ids + first)
        run = exists & (id == this)
        values = tl.load(
            dx + token[:, None] * COLUMNS + column[None, :], mask=run[:, None] & inside[None, :], other=0.0
        )
        total = tl.sum(values, 0)
        past = first + tl.sum(run.to(tl.int32))
        if (first == begin) & (begin > 0) & (earlier == this):
            tl.store(from_earlier, total, mask=inside)
        elif (past == end) & (end < tokens) & (later == this):
            tl.store(into_later, total, mask=inside)
        elif (this >= 0) & (this < rows):
            tl.store(gradient + this * COLUMNS + column, total.to(gradient.dtype.element_ty), mask=inside)
        first = past


@triton.jit(do_not_specialize=["tokens", "vocabulary", "positions", "types"])
def _join_runs_kernel(
    ids,  # (3, tokens) int64, sorted: of words, positions and types
    word,  # (vocabulary, COLUMNS), the gradients
    position,  # (positions, COLUMNS)
    token_type,  # (types, COLUMNS)
    workspace,  # (3, 2, chunks, COLUMNS) float32, what _add_runs_kernel has left there
    tokens,
    vocabulary,
    positions,
    types,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    chunks, chunk = tl.num_programs(0) // across, tl.program_id(0) // across
    column = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    gradient, rows = _of_table(word, position, token_type, vocabulary, positions, types)
    which, inside = tl.program_id(1).to(tl.int64), column < COLUMNS
    ids += which * tokens
    workspace += which * 2 * chunks * COLUMNS
    begin = chunk.to(tl.int64) * CHUNK
    end = begin + CHUNK
    goes_on = end < tokens
    this = tl.load(ids + end - 1, mask=goes_on, other=0)
    goes_on = goes_on & (tl.load(ids + end, mask=goes_on, other=0) == this)
    began_earlier = (begin > 0) & (tl.load(ids + begin - 1, mask=begin > 0, other=0) == this)
    # The program of the chunk in which the run begins adds all of it.
    if goes_on & (began_earlier == 0) & (this >= 0) & (this < rows):
        sums = tl.zeros((BLOCK_CHUNKS, BLOCK), tl.float32)
        next = chunk + 1
        while goes_on:
            others = next + tl.arange(0, BLOCK_CHUNKS)
            place = others.to(tl.int64) * CHUNK
            has = (others < chunks) & (tl.load(ids + place, mask=others < chunks, other=0) == this)
            from_earlier = workspace + others.to(tl.int64)[:, None] * COLUMNS + column[None, :]
            sums += tl.load(from_earlier, mask=has[:, None] & inside[None, :], other=0.0)
            goes_on = tl.sum(has.to(tl.int32)) == BLOCK_CHUNKS
            next += BLOCK_CHUNKS
        into_later = workspace + (chunks.to(tl.int64) + chunk) * COLUMNS + column
        total = tl.load(into_later, mask=inside, other=0.0) + tl.sum(sums, 0)
        tl.store(gradient + this * COLUMNS + column, total.to(gradient.dtype.element_ty), mask=inside)


def embed_layer_norm_fwd(ids, tables, eps, dropout_p, seed, save):
    """(out, mean, rstd): dropout(LayerNorm(the sum of the three rows)), and the statistics where they are saved.

    ids: (input_ids, position_ids, token_type_ids or None). tables: (word, position, token_type, weight, bias).
    """
    tensors = registry.dense(*ids, *tables)
    word, position, token_type = tensors[3:6]
    tokens, hidden = ids[0].shape[0], word.shape[1]
    out, mean, rstd = word.new_empty(tokens, hidden), *norm.statistics(word, tokens, save)
    block = norm.tile(hidden)
    _embed_layer_norm_fwd_kernel[(norm.programs(word.device, block, tokens),)](
        *(*tensors, seed, out, mean, rstd, tokens, word.shape[0], position.shape[0], token_type.shape[0]),
        *(eps, *dropout.settings(dropout_p, seed), hidden, block.rows, block.columns),
        num_warps=block.warps,
    )
    return out, mean, rstd


def embed_layer_norm_bwd(dout, ids, tables, mean, rstd, eps, dropout_p, seed):
    """The gradients of (word, position, token_type, weight, bias)."""
    dout, *tensors = registry.dense(dout, *ids, *tables)
    gradients = [*(torch.zeros_like(t) for t in tensors[3:6]), *(torch.empty_like(t) for t in tensors[6:])]
    (tokens, hidden), counts = dout.shape, [t.shape[0] for t in tensors[3:6]]
    block = norm.tile(hidden)
    length = norm.chunk_length(tokens, block)
    dx, workspace = torch.empty_like(dout, dtype=torch.float32), columns.workspace(dout, length, 2)
    _embed_layer_norm_bwd_kernel[(workspace.shape[1],)](
        *(dout, *tensors[:7], mean, rstd, seed, dx, workspace, tokens, length, *counts),
        *(*dropout.settings(dropout_p, seed), hidden, block.rows, block.columns),
        num_warps=block.warps,
    )
    columns.add_chunks(workspace, *gradients[3:])
    _add_to_tables(dx, ids, gradients[:3])
    return gradients


def _add_to_tables(dx, ids, gradients):
    """Fills the rows that have tokens of the three gradients, (rows, hidden), with the sums of these tokens' dx."""
    input_ids, position_ids, token_type_ids = ids
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    sorted_ids, order = torch.stack((input_ids, position_ids, types)).sort(dim=1, stable=True)
    (tokens, hidden), counts = dx.shape, [g.shape[0] for g in gradients]
    chunks, width = triton.cdiv(tokens, CHUNK), max(16, triton.next_power_of_2(hidden))
    workspace = torch.empty(3, 2, chunks, hidden, dtype=torch.float32, device=dx.device)
    block = min(RUN_COLUMNS, width)
    _add_runs_kernel[(chunks * triton.cdiv(hidden, block), 3)](
        *(sorted_ids, order, dx, *gradients, workspace, tokens, *counts, hidden, CHUNK, block),
        num_warps=RUN_WARPS,
    )
    block = min(JOIN_COLUMNS, width)
    _join_runs_kernel[(chunks * triton.cdiv(hidden, block), 3)](
        *(sorted_ids, *gradients, workspace, tokens, *counts, hidden, CHUNK, JOIN_CHUNKS, block),
        num_warps=JOIN_WARPS,
    )
