"""Attention of any length, tile by tile: inside the sequences of a packed batch, or over rectangles with a mask.

Forward: a program has some queries and goes through the keys. With m the largest score so far, l the sum of 2^(s - m)
and O the sum of 2^(s - m) v, a new tile multiplies l and O by 2^(m_old - m_new) before it adds its own. Sources:
Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023, "FlashAttention-2".

Backward: probabilities come back from the log-sum-exp. One kernel goes through the keys for dQ, and on its way leaves
delta = rowsum(dO O) = rowsum(P dP) for the other, which goes through the queries for dK and dV. That is two products
more than one kernel would need that adds dQ up in memory, and no atomics: two runs give the same bits.

Only the last tile of keys is masked by length. Queries are the rows of every tile of scores: see attention_short.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast import reference
from bertfast.kernels import dropout, hardware
from bertfast.kernels.attention_short import (
    LN_2,
    LOG2_E,
    differentiate,
    exponent_scale,
    find_sequence,
    load_rows,
    no_sum,
    recompute,
    store_rows,
    sum_over_queries,
    turn,
    turned,
)


@triton.jit
def _begin(tensor, first, sequence, head, batch_stride, row_stride, head_stride):
    """The first row of a head of a sequence: of a rectangle's, where `first`, of a packed tensor, is 0."""
    return tensor + (first * row_stride + sequence.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride)


@triton.jit
def _turn(cu_seqlens, order, turn, queries, keys):
    """(number, first token, queries, keys) of the sequence whose turn it is; without borders, all are as long."""
    if cu_seqlens is None:
        return turn, tl.zeros((), tl.int64), queries, keys
    else:
        sequence, first, length = find_sequence(cu_seqlens, order, turn)
        return sequence, first.to(tl.int64), length, length


@triton.jit
def _bias(mask, query, key, queries, keys, row_stride, column_stride):
    """What a mask adds to the scores, in exponents of 2: (queries, keys) float32.

    The lowest numbers of a format mean -inf, and are told apart from what could be a score as the reference does it.
    """
    inside = (query < queries)[:, None] & (key < keys)[None, :]
    at = query.to(tl.int64)[:, None] * row_stride + key.to(tl.int64)[None, :] * column_stride
    value = tl.load(mask + at, mask=inside, other=0)
    if mask.dtype.element_ty == tl.uint8:
        bias = tl.where(value != 0, 0.0, float("-inf"))
    else:
        bias = value.to(tl.float32)
        bias = tl.where(bias < -1e30, float("-inf"), bias * LOG2_E)
    return bias


@triton.jit
def _load_queries(rows, offsets, exists, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, NEGATIVE: tl.constexpr):
    """(queries, BLOCK_SIZE). A negative scale is its amount times -q: the largest score stays the largest exponent."""
    q = load_rows(rows, offsets, exists, SIZE, BLOCK_SIZE)
    if NEGATIVE:
        q = -q
    return q


@triton.jit
def _attend(
    q,
    k_rows,
    v_rows,
    o,
    top,
    total,
    query,
    first_key,
    keys,
    k_stride,
    v_stride,
    mask,
    queries,
    mask_row_stride,
    mask_column_stride,
    seed,
    head,
    sequence,
    scale_log2,
    threshold,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,  # the tile has all its keys
    PRECISION: tl.constexpr,
):
    """(o, top, total) after one more tile of keys."""
    column = tl.arange(0, KEYS)
    seen = column < (KEYS if WHOLE else keys - first_key)
    skip = tl.cast(first_key, tl.int64)
    k = load_rows(k_rows + skip * k_stride, column * k_stride, seen, SIZE, BLOCK_SIZE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if mask is not None:
        bias = _bias(mask, query, first_key + column, queries, keys, mask_row_stride, mask_column_stride)
        s = s * scale_log2 + bias
    if not WHOLE:
        s = tl.where(seen[None, :], s, float("-inf"))
    if mask is None:
        new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
    else:
        # As long as a query has seen no key, its largest score is no number to subtract.
        new_top = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(top - finite)
    total = total * shrink + tl.sum(p, 1)
    kept = None
    if seed is not None:
        kept = dropout.kept_keys(tl.load(seed), threshold, query, query * 0 + head, sequence, first_key, 6, KEYS)
    v = load_rows(v_rows + skip * v_stride, column * v_stride, seen, SIZE, BLOCK_SIZE)
    o = tl.dot(dropout.drop(p.to(v.dtype), kept), v, o * shrink[:, None], input_precision=PRECISION)
    return o, new_top, total


@triton.jit(do_not_specialize=["heads", "blocks", "queries", "keys", "threshold"])
def _varlen_attention_tiled_fwd_kernel(
    q,  # (tokens, heads, SIZE), or (batch, heads, queries, SIZE) without cu_seqlens
    k,
    v,
    mask,  # (batch, heads, queries, keys) uint8 or floating-point, or None
    cu_seqlens,  # (sequences + 1,) int32, or None
    order,  # (sequences,) int32: whose turn it is; None for one after another
    seed,  # (1,) int64, or None where nothing is dropped
    out,  # like q
    lse,  # (heads, tokens) or (batch, heads, queries) float32, or None where the backward will not want it
    heads,
    blocks,  # of queries, of the longest sequence
    queries,
    keys,
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
    out_batch_stride,
    out_row_stride,
    out_head_stride,
    lse_batch_stride,
    lse_head_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_column_stride,
    scale_log2,  # |scale| log2(e): scores are exponents of 2
    threshold,  # of dropout, and what the kept probabilities are multiplied by
    multiplier,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    RELOAD: tl.constexpr,  # at every step what stays the same: registers do not hold it
    NEGATIVE: tl.constexpr,  # the scale is
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
):
    program = tl.program_id(0)
    block, head = program % blocks, program // blocks % heads
    sequence, first, queries, keys = _turn(cu_seqlens, order, program // blocks // heads, queries, keys)
    begin = block * QUERIES
    if begin < queries:
        row = tl.arange(0, QUERIES)
        query = begin + row
        exists = query < queries
        q_rows = _begin(q, first + begin, sequence, head, q_batch_stride, q_row_stride, q_head_stride)
        k_rows = _begin(k, first, sequence, head, k_batch_stride, k_row_stride, k_head_stride)
        v_rows = _begin(v, first, sequence, head, v_batch_stride, v_row_stride, v_head_stride)
        if mask is not None:
            mask += sequence.to(tl.int64) * mask_batch_stride + head.to(tl.int64) * mask_head_stride
        queried = _load_queries(q_rows, row * q_row_stride, exists, SIZE, BLOCK_SIZE, NEGATIVE)
        o = tl.zeros((QUERIES, BLOCK_SIZE), tl.float32)
        top, total = tl.full((QUERIES,), float("-inf"), tl.float32), tl.zeros((QUERIES,), tl.float32)
        whole = keys // KEYS * KEYS
        for first_key in tl.range(0, whole, KEYS):
            here = queried
            if RELOAD:
                here = _load_queries(
                    q_rows, row * q_row_stride, exists & (first_key < keys), SIZE, BLOCK_SIZE, NEGATIVE
                )
            o, top, total = _attend(
                here, k_rows, v_rows, o, top, total, query, first_key, keys, k_row_stride, v_row_stride,
                mask, queries, mask_row_stride, mask_column_stride, seed, head, sequence, scale_log2,
                threshold, SIZE, BLOCK_SIZE, KEYS, True, PRECISION,
            )  # fmt: skip
        if whole < keys:
            o, top, total = _attend(
                queried, k_rows, v_rows, o, top, total, query, whole, keys, k_row_stride, v_row_stride,
                mask, queries, mask_row_stride, mask_column_stride, seed, head, sequence, scale_log2,
                threshold, SIZE, BLOCK_SIZE, KEYS, False, PRECISION,
            )  # fmt: skip
        sums = top + tl.log2(total)
        if cu_seqlens is None:  # a query may see no key at all
            sums = tl.where(total == 0, float("inf"), sums)
            total = tl.where(total == 0, 1.0, total)
        o *= (multiplier / total)[:, None]
        to = _begin(out, first + begin, sequence, head, out_batch_stride, out_row_stride, out_head_stride)
        store_rows(to, row * out_row_stride, exists, o, SIZE, BLOCK_SIZE)
        if lse is not None:
            to_lse = _begin(lse, first + begin, sequence, head, lse_batch_stride, 1, lse_head_stride)
            tl.store(to_lse + row, sums * LN_2, mask=exists)


@triton.jit
def _add_dq(
    dq,
    q,
    k_rows,
    v_rows,
    do,
    lse,
    delta,
    query,
    first_key,
    keys,
    k_stride,
    v_stride,
    mask,
    queries,
    mask_row_stride,
    mask_column_stride,
    seed,
    head,
    sequence,
    scale_log2,
    threshold,
    multiplier,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,  # the tile has all its keys
    PRECISION: tl.constexpr,
):
    """dq after one more tile of keys."""
    column = tl.arange(0, KEYS)
    seen = column < (KEYS if WHOLE else keys - first_key)
    skip = tl.cast(first_key, tl.int64)
    k = load_rows(k_rows + skip * k_stride, column * k_stride, seen, SIZE, BLOCK_SIZE)
    v = load_rows(v_rows + skip * v_stride, column * v_stride, seen, SIZE, BLOCK_SIZE)
    bias = None
    if mask is not None:
        bias = _bias(mask, query, first_key + column, queries, keys, mask_row_stride, mask_column_stride)
    inside = None
    if not WHOLE:
        inside = seen[None, :]
    p = recompute(q, k, lse, inside, bias, scale_log2, PRECISION)
    kept = None
    if seed is not None:
        kept = dropout.kept_keys(tl.load(seed), threshold, query, query * 0 + head, sequence, first_key, 6, KEYS)
    ds = differentiate(p, kept, multiplier, do, v, delta, PRECISION)
    return tl.dot(ds, k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["heads", "blocks", "queries", "keys", "threshold"])
def _varlen_attention_tiled_dq_kernel(
    dout,  # (tokens, heads, SIZE), or (batch, heads, queries, SIZE) without cu_seqlens
    q,
    k,
    v,
    mask,  # (batch, heads, queries, keys) uint8 or floating-point, or None
    cu_seqlens,  # (sequences + 1,) int32, or None
    order,  # (sequences,) int32: whose turn it is; None for one after another
    seed,  # (1,) int64, or None where nothing is dropped
    out,  # like dout
    lse,  # (heads, tokens) or (batch, heads, queries) float32
    delta,  # like lse: written for the other kernel
    dq,
    heads,
    blocks,  # of queries, of the longest sequence
    queries,
    keys,
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
    out_batch_stride,  # of dout too
    out_row_stride,
    out_head_stride,
    dq_batch_stride,
    dq_row_stride,
    dq_head_stride,
    lse_batch_stride,
    lse_head_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_column_stride,
    scale,
    scale_log2,  # |scale| log2(e): scores are exponents of 2
    threshold,  # of dropout, and what the kept probabilities are multiplied by
    multiplier,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    RELOAD: tl.constexpr,  # at every step what stays the same: registers do not hold it
    NEGATIVE: tl.constexpr,  # the scale is
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
):
    program = tl.program_id(0)
    block, head = program % blocks, program // blocks % heads
    sequence, first, queries, keys = _turn(cu_seqlens, order, program // blocks // heads, queries, keys)
    begin = block * QUERIES
    if begin < queries:
        row = tl.arange(0, QUERIES)
        query = begin + row
        exists = query < queries
        q_rows = _begin(q, first + begin, sequence, head, q_batch_stride, q_row_stride, q_head_stride)
        k_rows = _begin(k, first, sequence, head, k_batch_stride, k_row_stride, k_head_stride)
        v_rows = _begin(v, first, sequence, head, v_batch_stride, v_row_stride, v_head_stride)
        if mask is not None:
            mask += sequence.to(tl.int64) * mask_batch_stride + head.to(tl.int64) * mask_head_stride
        queried = _load_queries(q_rows, row * q_row_stride, exists, SIZE, BLOCK_SIZE, NEGATIVE)
        do_rows = _begin(dout, first + begin, sequence, head, out_batch_stride, out_row_stride, out_head_stride)
        do = load_rows(do_rows, row * out_row_stride, exists, SIZE, BLOCK_SIZE)
        o_rows = _begin(out, first + begin, sequence, head, out_batch_stride, out_row_stride, out_head_stride)
        o = load_rows(o_rows, row * out_row_stride, exists, SIZE, BLOCK_SIZE)
        differences = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        at = _begin(lse, first + begin, sequence, head, lse_batch_stride, 1, lse_head_stride)
        sums = tl.load(at + row, mask=exists, other=0.0) * LOG2_E
        to = _begin(delta, first + begin, sequence, head, lse_batch_stride, 1, lse_head_stride)
        tl.store(to + row, differences, mask=exists)
        total = tl.zeros((QUERIES, BLOCK_SIZE), tl.float32)
        whole = keys // KEYS * KEYS
        for first_key in tl.range(0, whole, KEYS):
            here, do_here = queried, do
            if RELOAD:
                always = exists & (first_key < keys)
                here = _load_queries(q_rows, row * q_row_stride, always, SIZE, BLOCK_SIZE, NEGATIVE)
                do_here = load_rows(do_rows, row * out_row_stride, always, SIZE, BLOCK_SIZE)
            total = _add_dq(
                total, here, k_rows, v_rows, do_here, sums, differences, query, first_key, keys, k_row_stride,
                v_row_stride, mask, queries, mask_row_stride, mask_column_stride, seed, head, sequence, scale_log2,
                threshold, multiplier, SIZE, BLOCK_SIZE, KEYS, True, PRECISION,
            )  # fmt: skip
        if whole < keys:
            total = _add_dq(
                total, queried, k_rows, v_rows, do, sums, differences, query, whole, keys, k_row_stride,
                v_row_stride, mask, queries, mask_row_stride, mask_column_stride, seed, head, sequence, scale_log2,
                threshold, multiplier, SIZE, BLOCK_SIZE, KEYS, False, PRECISION,
            )  # fmt: skip
        to_dq = _begin(dq, first + begin, sequence, head, dq_batch_stride, dq_row_stride, dq_head_stride)
        store_rows(to_dq, row * dq_row_stride, exists, total * scale, SIZE, BLOCK_SIZE)


@triton.jit(do_not_specialize=["heads", "blocks", "queries", "keys", "threshold"])
def _varlen_attention_tiled_dkv_kernel(
    dout,  # (tokens, heads, SIZE), or (batch, heads, queries, SIZE) without cu_seqlens
    q,
    k,
    v,
    mask,  # (batch, heads, queries, keys) uint8 or floating-point, or None
    cu_seqlens,  # (sequences + 1,) int32, or None
    order,  # (sequences,) int32: whose turn it is; None for one after another
    seed,  # (1,) int64, or None where nothing is dropped
    lse,  # (heads, tokens) or (batch, heads, queries) float32
    delta,  # like lse
    dk,
    dv,
    heads,
    blocks,  # of keys, of the longest sequence
    queries,
    keys,
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
    out_batch_stride,  # of dout
    out_row_stride,
    out_head_stride,
    dk_batch_stride,  # of dv too
    dk_row_stride,
    dk_head_stride,
    lse_batch_stride,
    lse_head_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_column_stride,
    scale,
    scale_log2,  # |scale| log2(e): scores are exponents of 2
    threshold,  # of dropout, and what the kept probabilities are multiplied by
    multiplier,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TURNED: tl.constexpr,  # how dk and dv are summed
    RELOAD: tl.constexpr,  # at every step what stays the same: registers do not hold it
    NEGATIVE: tl.constexpr,  # the scale is
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
):
    program = tl.program_id(0)
    block, head = program % blocks, program // blocks % heads
    sequence, first, queries, keys = _turn(cu_seqlens, order, program // blocks // heads, queries, keys)
    begin = block * KEYS
    if begin < keys:
        column, row = tl.arange(0, KEYS), tl.arange(0, QUERIES)
        exists = begin + column < keys
        k_rows = _begin(k, first + begin, sequence, head, k_batch_stride, k_row_stride, k_head_stride)
        v_rows = _begin(v, first + begin, sequence, head, v_batch_stride, v_row_stride, v_head_stride)
        q_rows = _begin(q, first, sequence, head, q_batch_stride, q_row_stride, q_head_stride)
        do_rows = _begin(dout, first, sequence, head, out_batch_stride, out_row_stride, out_head_stride)
        from_lse = _begin(lse, first, sequence, head, lse_batch_stride, 1, lse_head_stride)
        from_delta = _begin(delta, first, sequence, head, lse_batch_stride, 1, lse_head_stride)
        if mask is not None:
            mask += sequence.to(tl.int64) * mask_batch_stride + head.to(tl.int64) * mask_head_stride
        keyed = load_rows(k_rows, column * k_row_stride, exists, SIZE, BLOCK_SIZE)
        valued = load_rows(v_rows, column * v_row_stride, exists, SIZE, BLOCK_SIZE)
        k_total, v_total = no_sum(KEYS, BLOCK_SIZE, TURNED), no_sum(KEYS, BLOCK_SIZE, TURNED)
        for first_query in tl.range(0, queries, QUERIES):
            query = first_query + row
            inside = query < queries
            skip = tl.cast(first_query, tl.int64)
            queried = _load_queries(
                q_rows + skip * q_row_stride, row * q_row_stride, inside, SIZE, BLOCK_SIZE, NEGATIVE
            )
            k_here, v_here = keyed, valued
            if RELOAD:
                always = exists & (first_query < queries)
                k_here = load_rows(k_rows, column * k_row_stride, always, SIZE, BLOCK_SIZE)
                v_here = load_rows(v_rows, column * v_row_stride, always, SIZE, BLOCK_SIZE)
            do = load_rows(do_rows + skip * out_row_stride, row * out_row_stride, inside, SIZE, BLOCK_SIZE)
            # Queries that are not there have dO = delta = 0, and keys that are not there are not written.
            sums = tl.load(from_lse + query, mask=inside, other=0.0) * LOG2_E
            differences = tl.load(from_delta + query, mask=inside, other=0.0)
            bias = None
            if mask is not None:
                bias = _bias(mask, query, begin + column, queries, keys, mask_row_stride, mask_column_stride)
            p = recompute(queried, k_here, sums, None, bias, scale_log2, PRECISION)
            kept = None
            if seed is not None:
                kept = dropout.kept_keys(tl.load(seed), threshold, query, query * 0 + head, sequence, begin, 6, KEYS)
            v_total = sum_over_queries(v_total, dropout.drop(p.to(do.dtype), kept), do, TURNED, PRECISION)
            ds = differentiate(p, kept, multiplier, do, v_here, differences, PRECISION)
            k_total = sum_over_queries(k_total, ds, queried, TURNED, PRECISION)
        to_k = _begin(dk, first + begin, sequence, head, dk_batch_stride, dk_row_stride, dk_head_stride)
        store_rows(to_k, column * dk_row_stride, exists, turn(k_total, TURNED) * tl.abs(scale), SIZE, BLOCK_SIZE)
        to_v = _begin(dv, first + begin, sequence, head, dk_batch_stride, dk_row_stride, dk_head_stride)
        store_rows(to_v, column * dk_row_stride, exists, turn(v_total, TURNED) * multiplier, SIZE, BLOCK_SIZE)


class Tile(NamedTuple):
    """The tile of scores that a program has at a time, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    dq: Tile
    dkv: Tile


# What fits into shared memory and registers without spills, with dropout too, by architecture and head size. Larger
# tiles load keys and values less often. Where a sequence of up to 128 tokens has one tile of keys it gets the bits that
# attention_short.py gives it.
_AMPERE = {
    32: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    64: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    128: Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 64, 8, 2)),
}
_HOPPER = {
    32: Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    64: Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
}
HALF: dict[int, dict[int, Tiles]] = {80: _AMPERE, 90: _HOPPER}
# With a mask, which takes registers of its own, for all head sizes.
MASKED: dict[int, Tiles] = {
    80: Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    90: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 1)),
}
TF32: dict[int, dict[int, Tiles]] = {
    80: {
        32: Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
        64: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        128: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    90: {
        32: Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
        64: Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
        128: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1)),
    },
}
# On the ordinary units, which take both factors from registers.
IEEE: dict[int, Tiles] = {
    32: Tiles(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 4, 1)),
    64: Tiles(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    128: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
}


def choose(architecture: int, dtype: torch.dtype, block_size: int, precision: str, masked: bool = False) -> Tiles:
    """The tiles of the three kernels."""
    known = 90 if architecture >= 90 else 80
    if masked and dtype != torch.float32:
        return MASKED[known]
    by_size = HALF[known] if dtype != torch.float32 else TF32[known] if precision == "tf32" else IEEE
    return by_size[max(32, block_size)]


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """From sequence to sequence, row to row and head to head; a packed tensor's sequences begin at their borders."""
    if tensor.dim() == 3:
        return 0, tensor.stride(0), tensor.stride(1)
    return tensor.stride(0), tensor.stride(2), tensor.stride(1)


class Attention(NamedTuple):
    """What the kernels are told of the tensors, packed (cu_seqlens is one) or rectangles."""

    q: Tensor  # (tokens, heads, size) or (batch, heads, queries, size); the last axis dense
    k: Tensor
    v: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    order: Tensor | None
    sequences: int
    queries: int  # of the longest sequence
    keys: int
    scale: float
    dropout_p: float
    seed: Tensor | None
    precision: str

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def tiles(self) -> Tiles:
        block_size = self.settings()["BLOCK_SIZE"]
        architecture, masked = hardware.architecture(self.q.device), self.mask is not None
        return choose(architecture, self.q.dtype, block_size, self.precision, masked)

    def lse_strides(self) -> tuple[int, int]:
        """From sequence to sequence, and from head to head."""
        rows = self.q.shape[0] if self.q.dim() == 3 else self.queries
        return (0 if self.q.dim() == 3 else self.heads * rows), rows

    def mask_strides(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.mask is None else self.mask.stride()

    def settings(self) -> dict[str, object]:
        """The arguments that all three kernels are given by name."""
        size = self.q.shape[-1]
        threshold, multiplier = dropout.settings(self.dropout_p, self.seed, reference.KEY_BITS)
        return {
            "scale_log2": exponent_scale(self.scale),
            "threshold": threshold,
            "multiplier": multiplier,
            "SIZE": size,
            "BLOCK_SIZE": max(16, triton.next_power_of_2(size)),
            "RELOAD": self.q.dtype == torch.float32 and (self.precision == "ieee" or size > 64),
            "NEGATIVE": self.scale < 0,
            "PRECISION": self.precision,
        }


def _compiled(tile: Tile) -> dict[str, int]:
    return {"QUERIES": tile.queries, "KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


def forward(a: Attention, out: Tensor, lse: Tensor | None) -> None:
    """Fills out and, where it is one, lse."""
    tile = a.tiles().forward
    blocks = triton.cdiv(a.queries, tile.queries)
    _varlen_attention_tiled_fwd_kernel[(a.sequences * a.heads * blocks,)](
        *(a.q, a.k, a.v, a.mask, a.cu_seqlens, a.order, a.seed, out, lse, a.heads, blocks, a.queries, a.keys),
        *(*_strides(a.q), *_strides(a.k), *_strides(a.v), *_strides(out), *a.lse_strides(), *a.mask_strides()),
        **a.settings(),
        **_compiled(tile),
    )


def backward(a: Attention, dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Fills dq, dk and dv. dout and out have the same strides, and so have dk and dv."""
    tiles, delta = a.tiles(), torch.empty_like(lse)
    blocks = triton.cdiv(a.queries, tiles.dq.queries)
    _varlen_attention_tiled_dq_kernel[(a.sequences * a.heads * blocks,)](
        *(dout, a.q, a.k, a.v, a.mask, a.cu_seqlens, a.order, a.seed, out, lse, delta, dq),
        *(a.heads, blocks, a.queries, a.keys),
        *(*_strides(a.q), *_strides(a.k), *_strides(a.v), *_strides(out), *_strides(dq)),
        *(*a.lse_strides(), *a.mask_strides(), a.scale),
        **a.settings(),
        **_compiled(tiles.dq),
    )
    blocks = triton.cdiv(a.keys, tiles.dkv.keys)
    _varlen_attention_tiled_dkv_kernel[(a.sequences * a.heads * blocks,)](
        *(dout, a.q, a.k, a.v, a.mask, a.cu_seqlens, a.order, a.seed, lse, delta, dk, dv),
        *(a.heads, blocks, a.queries, a.keys),
        *(*_strides(a.q), *_strides(a.k), *_strides(a.v), *_strides(out), *_strides(dk)),
        *(*a.lse_strides(), *a.mask_strides(), a.scale),
        TURNED=turned(hardware.architecture(a.q.device), a.q.shape[-1]),
        **a.settings(),
        **_compiled(tiles.dkv),
    )
