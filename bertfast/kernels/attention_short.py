"""Attention inside sequences of at most 128 tokens, in half precision: all keys and values at once, no online softmax.

A tile has 64 queries. Sequences of up to 64 tokens have one tile, and the shorter they are the more heads share it: one
head of 33 to 64 tokens, two of 17 to 32, four of 16 or fewer stand behind one another in its rows and among its keys,
and where query and key are of two heads the probability is 0. So the matrix units always have the shapes that they
like, and a short sequence costs a fraction of a tile whatever the longest one in the batch is. Sequences of 65 to 128
tokens have two tiles of queries by 128 keys.

The backward makes the probabilities again from the log-sum-exp of each row. A program has all queries of its heads and
takes the keys 64 at a time: dK and dV of these are done then and there, and dQ adds up. Nothing is shared between
programs, so nothing is atomic and two runs give the same bits.

Queries are the rows of every tile of scores, because then a thread draws dropout's random bits for keys of its own: see
`dropout.kept_keys`. The probabilities reach the products that sum over queries by way of shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast import reference
from bertfast.kernels import dropout, hardware

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_sequence(cu_seqlens, order, turn):
    """(number, first token, length) of the sequence whose turn it is."""
    sequence = turn
    if order is not None:
        sequence = tl.load(order + turn)
    first = tl.load(cu_seqlens + sequence)
    return sequence, first, tl.load(cu_seqlens + sequence + 1) - first


@triton.jit
def load_rows(tensor, offsets, exists, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(rows, BLOCK_SIZE): the rows at these offsets, 0 behind their ends and where a row does not exist."""
    column = tl.arange(0, BLOCK_SIZE)
    mask = exists[:, None]
    if SIZE != BLOCK_SIZE:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(tensor + (offsets[:, None] + column[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(tensor, offsets, exists, values, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Writes values, (rows, BLOCK_SIZE), to the rows that exist."""
    column = tl.arange(0, BLOCK_SIZE)
    mask = exists[:, None]
    if SIZE != BLOCK_SIZE:
        mask = mask & (column < SIZE)[None, :]
    tl.store(tensor + (offsets[:, None] + column[None, :]), values.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _places(head, heads, length, LONGEST: tl.constexpr):
    """Where the rows of a tile of 64 stand: (log2 of a head's rows, each row's head, token, and whether it exists)."""
    shift = tl.where(length <= 16, 4, tl.where(length <= 32, 5, 6))
    row = tl.arange(0, 64)
    token, row_head = row & ((1 << shift) - 1), head + (row >> shift)
    return shift, row_head, token, (token < length) & (row_head < heads)


@triton.jit
def _probabilities(q, k, same, scale_log2):
    """softmax(scale q k^T) over the keys that are `same`, not yet divided by the sums; the maxima and the sums."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = tl.where(same, s, float("-inf"))
    top = tl.max(s, 1) * scale_log2
    p = tl.exp2(s * scale_log2 - top[:, None])
    return p, top, tl.sum(p, 1)


@triton.jit(do_not_specialize=["tokens", "heads", "groups", "threshold"])
def _varlen_attention_short_fwd_kernel(
    qkv,  # (tokens, 3, heads, SIZE)
    cu_seqlens,  # (sequences + 1,) int32
    order,  # (sequences,) int32: whose turn it is; None for one after another
    seed,  # (1,) int64, or None where nothing is dropped
    out,  # (tokens, heads, SIZE)
    lse,  # (heads, tokens) float32, or None where the backward will not want it
    tokens,
    heads,
    groups,  # of heads that share a tile where sequences are as long as LONGEST
    token_stride,
    part_stride,
    head_stride,
    scale_log2,  # |scale| log2(e): scores are exponents of 2
    threshold,  # of dropout, and what the kept probabilities are multiplied by
    multiplier,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LONGEST: tl.constexpr,  # 16, 32, 64 or 128: no sequence is longer
    PARTS: tl.constexpr,  # the programs that share 128 queries, 1 or 2
    NEGATIVE: tl.constexpr,  # the scale is
):
    program = tl.program_id(0)
    part, group = program % PARTS, program // PARTS % groups
    sequence, first, length = find_sequence(cu_seqlens, order, program // PARTS // groups)
    head = group * (64 // min(LONGEST, 64))
    start = first.to(tl.int64)
    rows, written = qkv + start * token_stride, out + start * heads * SIZE
    if length <= 64:
        shift, row_head, token, exists = _places(head, heads, length, LONGEST)
        # Longer heads have a tile to fewer of them than LONGEST's group has: its first programs take all.
        if (length > 0) & (part == 0) & ((head << shift) % 64 == 0):
            at = token * token_stride + row_head * head_stride
            q = load_rows(rows, at, exists, SIZE, BLOCK_SIZE)
            k = load_rows(rows + part_stride, at, exists, SIZE, BLOCK_SIZE)
            v = load_rows(rows + 2 * part_stride, at, exists, SIZE, BLOCK_SIZE)
            if NEGATIVE:
                q = -q
            same = row_head[:, None] == tl.where(exists, row_head, -1)[None, :]
            p, top, total = _probabilities(q, k, same, scale_log2)
            kept = None
            if seed is not None:
                kept = dropout.kept_keys(tl.load(seed), threshold, token, row_head, sequence, 0, shift, 64)
            o = tl.dot(dropout.drop(p.to(v.dtype), kept), v, input_precision="ieee") * (multiplier / total)[:, None]
            store_rows(written, (token * heads + row_head) * SIZE, exists, o, SIZE, BLOCK_SIZE)
            if lse is not None:
                to = lse + row_head.to(tl.int64) * tokens + (start + token)
                tl.store(to, (top + tl.log2(total)) * LN_2, mask=exists)
    elif LONGEST > 64:
        column = tl.arange(0, 128)
        rows += head * head_stride
        k = load_rows(rows + part_stride, column * token_stride, column < length, SIZE, BLOCK_SIZE)
        v = load_rows(rows + 2 * part_stride, column * token_stride, column < length, SIZE, BLOCK_SIZE)
        for query in tl.range(part * 64, length, PARTS * 64, num_stages=1):
            token = query + tl.arange(0, 64)
            exists = token < length
            q = load_rows(rows, token * token_stride, exists, SIZE, BLOCK_SIZE)
            if NEGATIVE:
                q = -q
            p, top, total = _probabilities(q, k, (column < length)[None, :], scale_log2)
            kept = None
            if seed is not None:
                kept = dropout.kept_keys(tl.load(seed), threshold, token, token * 0 + head, sequence, 0, 6, 128)
            o = tl.dot(dropout.drop(p.to(v.dtype), kept), v, input_precision="ieee") * (multiplier / total)[:, None]
            store_rows(written, (token * heads + head) * SIZE, exists, o, SIZE, BLOCK_SIZE)
            if lse is not None:
                to = lse + head.to(tl.int64) * tokens + (start + token)
                tl.store(to, (top + tl.log2(total)) * LN_2, mask=exists)


@triton.jit
def recompute(q, k, lse, seen, bias, scale_log2, PRECISION: tl.constexpr):
    """The probabilities, (queries, keys). lse and bias (or None) are exponents of 2; keys not seen (or None) have 0."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if bias is not None:
        x += bias
    p = tl.exp2(x - lse[:, None])
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    return p


@triton.jit
def no_sum(KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TURNED: tl.constexpr):
    """Zeros for `sum_over_queries` to begin with."""
    if TURNED:
        return tl.zeros((BLOCK_SIZE, KEYS), tl.float32)
    else:
        return tl.zeros((KEYS, BLOCK_SIZE), tl.float32)


@triton.jit
def sum_over_queries(total, scores, rows, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """total + scores^T rows, (keys, BLOCK_SIZE), or turned over, rows^T scores. `turn` gives it back."""
    if TURNED:
        return tl.dot(tl.trans(rows), scores, total, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(scores), rows, total, input_precision=PRECISION)


@triton.jit
def turn(total, TURNED: tl.constexpr):
    """(keys, BLOCK_SIZE) float32 of what `sum_over_queries` has summed."""
    if TURNED:
        return tl.trans(total)
    else:
        return total


@triton.jit
def differentiate(p, kept, multiplier, do, v, delta, PRECISION: tl.constexpr):
    """dS / scale, rounded. delta: rowsum(P dP)."""
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if kept is not None:
        dp = dropout.drop(dp, kept) * multiplier
    return (p * (dp - delta[:, None])).to(do.dtype)


@triton.jit(do_not_specialize=["tokens", "heads", "groups", "threshold"])
def _varlen_attention_short_bwd_kernel(
    dout,  # (tokens, heads, SIZE)
    qkv,  # (tokens, 3, heads, SIZE)
    cu_seqlens,  # (sequences + 1,) int32
    order,  # (sequences,) int32: whose turn it is; None for one after another
    seed,  # (1,) int64, or None where nothing is dropped
    out,  # (tokens, heads, SIZE)
    lse,  # (heads, tokens) float32
    dqkv,  # (tokens, 3, heads, SIZE), dense
    tokens,
    heads,
    groups,  # of heads that share a tile where sequences are as long as LONGEST
    token_stride,
    part_stride,
    head_stride,
    scale,
    scale_log2,  # |scale| log2(e): scores are exponents of 2
    threshold,  # of dropout, and what the kept probabilities are multiplied by
    multiplier,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LONGEST: tl.constexpr,  # 16, 32, 64 or 128: no sequence is longer
    TURNED: tl.constexpr,  # how dk and dv are summed
    NEGATIVE: tl.constexpr,  # the scale is
):
    program = tl.program_id(0)
    sequence, first, length = find_sequence(cu_seqlens, order, program // groups)
    head = program % groups * (64 // min(LONGEST, 64))
    start = first.to(tl.int64)
    rows, step = qkv + start * token_stride, heads * SIZE
    douts, outs, gradients = dout + start * step, out + start * step, dqkv + start * (3 * step)
    if length <= 64:
        shift, row_head, token, exists = _places(head, heads, length, LONGEST)
        if (length > 0) & ((head << shift) % 64 == 0):
            at = token * token_stride + row_head * head_stride
            q = load_rows(rows, at, exists, SIZE, BLOCK_SIZE)
            k = load_rows(rows + part_stride, at, exists, SIZE, BLOCK_SIZE)
            v = load_rows(rows + 2 * part_stride, at, exists, SIZE, BLOCK_SIZE)
            if NEGATIVE:
                q = -q
            at = (token * heads + row_head) * SIZE
            do = load_rows(douts, at, exists, SIZE, BLOCK_SIZE)
            o = load_rows(outs, at, exists, SIZE, BLOCK_SIZE)
            delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
            from_lse = lse + row_head.to(tl.int64) * tokens + (start + token)
            sums = tl.load(from_lse, mask=exists, other=0.0) * LOG2_E
            same = row_head[:, None] == tl.where(exists, row_head, -1)[None, :]
            nothing = no_sum(64, BLOCK_SIZE, TURNED)
            p = recompute(q, k, sums, same, None, scale_log2, "ieee")
            kept = None
            if seed is not None:
                kept = dropout.kept_keys(tl.load(seed), threshold, token, row_head, sequence, 0, shift, 64)
            dv = sum_over_queries(nothing, dropout.drop(p.to(do.dtype), kept), do, TURNED, "ieee")
            ds = differentiate(p, kept, multiplier, do, v, delta, "ieee")
            dk = sum_over_queries(nothing, ds, q, TURNED, "ieee")
            dq = tl.dot(ds, k, input_precision="ieee")
            at = (token * 3 * heads + row_head) * SIZE
            store_rows(gradients, at, exists, dq * scale, SIZE, BLOCK_SIZE)
            store_rows(gradients + step, at, exists, turn(dk, TURNED) * tl.abs(scale), SIZE, BLOCK_SIZE)
            store_rows(gradients + 2 * step, at, exists, turn(dv, TURNED) * multiplier, SIZE, BLOCK_SIZE)
    elif LONGEST > 64:
        query = tl.arange(0, 128)
        inside = query < length
        rows += head * head_stride
        q = load_rows(rows, query * token_stride, inside, SIZE, BLOCK_SIZE)
        if NEGATIVE:
            q = -q
        place = (query * heads + head) * SIZE
        do = load_rows(douts, place, inside, SIZE, BLOCK_SIZE)
        o = load_rows(outs, place, inside, SIZE, BLOCK_SIZE)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        sums = tl.load(lse + head.to(tl.int64) * tokens + (start + query), mask=inside, other=0.0) * LOG2_E
        dq = tl.zeros((128, BLOCK_SIZE), tl.float32)
        for first_key in tl.range(0, 128, 64, num_stages=1):
            column = first_key + tl.arange(0, 64)
            seen = column < length
            k = load_rows(rows + part_stride, column * token_stride, seen, SIZE, BLOCK_SIZE)
            v = load_rows(rows + 2 * part_stride, column * token_stride, seen, SIZE, BLOCK_SIZE)
            nothing = no_sum(64, BLOCK_SIZE, TURNED)
            p = recompute(q, k, sums, seen[None, :], None, scale_log2, "ieee")
            kept = None
            if seed is not None:
                kept = dropout.kept_keys(tl.load(seed), threshold, query, query * 0 + head, sequence, first_key, 6, 64)
            dv = sum_over_queries(nothing, dropout.drop(p.to(do.dtype), kept), do, TURNED, "ieee")
            to = (column * 3 * heads + head) * SIZE
            store_rows(gradients + 2 * step, to, seen, turn(dv, TURNED) * multiplier, SIZE, BLOCK_SIZE)
            ds = differentiate(p, kept, multiplier, do, v, delta, "ieee")
            dk = sum_over_queries(nothing, ds, q, TURNED, "ieee")
            dq = tl.dot(ds, k, dq, input_precision="ieee")
            store_rows(gradients + step, to, seen, turn(dk, TURNED) * tl.abs(scale), SIZE, BLOCK_SIZE)
        store_rows(gradients, (query * 3 * heads + head) * SIZE, inside, dq * scale, SIZE, BLOCK_SIZE)


def exponent_scale(scale: float) -> float:
    """What makes exponents of 2 of the products q k^T. It is not 0, which -inf must not be multiplied by."""
    return max(abs(scale) * LOG2_E.value, 1e-30)


def turned(architecture: int, size: int) -> bool:
    """Whether sums over the queries are calculated turned over.

    Then both factors lie in shared memory as they are, which the matrix units of Hopper and later read from there. But
    they take 64 rows at a time, here elements of a head. Others take factors from registers, to which it makes no odds.
    """
    return architecture >= 90 and size > 32


def fits(qkv: Tensor, max_seqlen: int, backward: bool) -> bool:
    """Whether these kernels are for sequences of at most this length: whether registers hold what they have at once."""
    longest = 128 if qkv.shape[3] <= 64 else 0 if backward else 64
    return qkv.dtype != torch.float32 and max_seqlen <= longest


def _settings(qkv, max_seqlen, scale, dropout_p, seed):
    """The arguments that both kernels are given by name."""
    heads, size = qkv.shape[2:]
    longest = max(16, triton.next_power_of_2(max_seqlen))
    threshold, multiplier = dropout.settings(dropout_p, seed, reference.KEY_BITS)
    return {
        "tokens": qkv.shape[0],
        "heads": heads,
        "groups": triton.cdiv(heads, 64 // min(longest, 64)),
        "token_stride": qkv.stride(0),
        "part_stride": qkv.stride(1),
        "head_stride": qkv.stride(2),
        "scale_log2": exponent_scale(scale),
        "threshold": threshold,
        "multiplier": multiplier,
        "SIZE": size,
        "BLOCK_SIZE": max(16, triton.next_power_of_2(size)),
        "LONGEST": longest,
        "NEGATIVE": scale < 0,
    }


def forward(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, out, lse):
    """Fills out and, where it is one, lse."""
    settings = _settings(qkv, max_seqlen, scale, dropout_p, seed)
    programs = (cu_seqlens.shape[0] - 1) * settings["groups"]
    parts = 2 if settings["LONGEST"] == 128 and programs < 2 * hardware.multiprocessors(qkv.device) else 1
    # The compiler draws random numbers ahead of their use into whatever registers there are. With these, three programs
    # fit on a multiprocessor whose shared memory holds as many; heads of another size would spill.
    roomy = hardware.architecture(qkv.device) in (80, 90)
    limited = roomy and settings["LONGEST"] == 128 and settings["BLOCK_SIZE"] == 64 and seed is not None
    limit = {"maxnreg": 168} if limited else {}
    _varlen_attention_short_fwd_kernel[(programs * parts,)](
        qkv, cu_seqlens, order, seed, out, lse, **settings, PARTS=parts, num_warps=4, **limit
    )


def backward(qkv, cu_seqlens, max_seqlen, order, scale, dropout_p, seed, dout, out, lse, dqkv):
    """Fills dqkv."""
    settings = _settings(qkv, max_seqlen, scale, dropout_p, seed)
    programs = (cu_seqlens.shape[0] - 1) * settings["groups"]
    warps = 8 if settings["LONGEST"] == 128 else 4
    architecture = hardware.architecture(qkv.device)
    # There the compiler would rather spill a word than give up the second program on a multiprocessor.
    cramped = architecture >= 100 and warps == 8 and settings["BLOCK_SIZE"] == 32 and seed is not None
    limit = {"maxnreg": 160} if cramped else {}
    _varlen_attention_short_bwd_kernel[(programs,)](
        *(dout, qkv, cu_seqlens, order, seed, out, lse, dqkv),
        scale=scale,
        TURNED=turned(architecture, qkv.shape[3]),
        **settings,
        num_warps=warps,
        **limit,
    )
