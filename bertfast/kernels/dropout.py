"""The random bits of dropout, the same as `bertfast.reference.dropout_multiplier` bit for bit: Philox4x32-7.

One call of Philox gives four words of 32 bits, which serve eight columns of a row, 16 bits each, or sixteen keys of
attention, 8 bits each. A thread keeps the columns of a row that it draws: they come out of `tl.join` in its own
registers, in the layout that 16-byte accesses have.
"""

import torch
import triton
import triton.language as tl

from bertfast import reference


def settings(p: float, seed: torch.Tensor | None, bits: int = 16) -> tuple[int, float]:
    """What a kernel is told of the probability: bits below the first drop an element, the second scales the rest."""
    threshold = 0 if seed is None else reference.dropout_threshold(p, bits)
    return threshold, 65536 / (65536 - threshold)


# All 64 bits of a product: of the plain one, each half may become an instruction of its own.
_MULTIPLY_WIDE = tl.constexpr("mul.wide.u32 $0, $1, $2;")


@triton.jit
def _multiply_wide(a, b: tl.constexpr):
    """a * b, of uint32, as uint64."""
    return tl.inline_asm_elementwise(
        _MULTIPLY_WIDE, "=l,r,r", [a, tl.cast(b, tl.uint32)], dtype=tl.uint64, is_pure=True, pack=1
    )


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four uint32 words for each counter (c0, c1, c2, c3) of uint32. seed: int64, its halves are the key.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        left, right = _multiply_wide(c0, 0xD2511F53), _multiply_wide(c2, 0xCD9E8D57)
        c0, c1 = (right >> 32).to(tl.uint32) ^ c1 ^ k0, right.to(tl.uint32)
        c2, c3 = (left >> 32).to(tl.uint32) ^ c3 ^ k1, left.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def row_multiplier(seed, threshold, scale, row, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """0 where the element is dropped, scale where it is kept: (rows, BLOCK) float32, of the columns from 0 on.

    row: (rows,) int64. VECTOR: the columns that a thread holds side by side, 8 or 4. Four columns are half of what a
    call of Philox serves, and the neighbour makes the call once more, which costs less than handing its result over.
    """
    rows: tl.constexpr = row.shape[0]
    groups: tl.constexpr = BLOCK // VECTOR
    group = tl.broadcast_to(tl.arange(0, groups)[None, :], (rows, groups))
    low = tl.broadcast_to(row.to(tl.uint32)[:, None], (rows, groups))
    high = tl.broadcast_to((row >> 32).to(tl.uint32)[:, None], (rows, groups))
    w0, w1, w2, w3 = philox(seed, (group // (8 // VECTOR)).to(tl.uint32), low, high, tl.zeros_like(low))
    if VECTOR == 8:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (rows, groups, word >> 1, word & 1)
    else:
        right = group % 2 == 1
        words = tl.join(tl.where(right, w2, w0), tl.where(right, w3, w1))
    # What stands below an upper half is too little to matter against a threshold with zeros there.
    drawn = tl.reshape(tl.join(words << 16, words), (rows, BLOCK))
    return tl.where(drawn >= (threshold.to(tl.uint32) << 16), scale, 0.0)


@triton.jit
def _not_below(x, threshold):
    """Which of the four bytes of x are not below those of the threshold, in their highest bits."""
    others = (x | 0x80808080) - (threshold & 0x7F7F7F7F)
    return (x & others) | ((x | others) & ~threshold)


@triton.jit
def kept_keys(seed, threshold, query, head, sequence, first, shift, KEYS: tl.constexpr):
    """Which of the keys first .. first + KEYS are kept of each query's, for `drop`: (queries, KEYS) words
    whose bytes have it in their highest bits, and (1, KEYS) which byte it is. KEYS divides 64, or 64 divides it; it
    divides first.

    query, head: (queries,) int32. shift: of 64 keys the first 2^shift repeat, as those of heads that
    stand side by side do.

    A call of Philox serves sixteen keys, which are one thread's where a product of the matrix units has the keys as its
    columns: see `reference.key_dropout_multiplier`. Each key says here which call and which byte of it are its own;
    that sixteen calls of a thread are the same and that their bytes are known is left to the compiler, which makes
    them one. Rows and columns of counters are broadcast where a round mixes them, so that the first two rounds cost
    next to nothing.
    """
    key = tl.arange(0, KEYS)
    group = (first >> 6) * 4 + (key >> 6) * 4 + (key >> 1 & 3)
    w0, w1, w2, w3 = philox(
        seed,
        group[None, :].to(tl.uint32),
        query[:, None].to(tl.uint32),
        head[:, None].to(tl.uint32),
        sequence.to(tl.uint32),
    )
    bytes_ = (threshold >> 8).to(tl.uint32) * 0x01010101
    w0, w1 = _not_below(w0, bytes_), _not_below(w1, bytes_)
    w2, w3 = _not_below(w2, bytes_), _not_below(w3, bytes_)
    if KEYS == 64:
        w1 = tl.where(shift == 4, w0, w1)
        w2, w3 = tl.where(shift == 6, w2, w0), tl.where(shift == 6, w3, w1)
    place = (key if KEYS >= 64 else first + key)[None, :]
    word = tl.where((place & 32) != 0, tl.where((place & 16) != 0, w3, w2), tl.where((place & 16) != 0, w1, w0))
    return word, (place >> 2 & 2) + (place & 1)


# PTX that zeroes what is dropped. `prmt` makes bytes that are all like the highest bit of a byte of a word: of its own
# word for 32 bits, of two words for a pair of 16. Left to itself the compiler selects half precision numbers one by
# one and packs them again, 3 instructions an element instead of one; and in a backward, which wants the bits twice, it
# may draw them in the layout of other threads and hand the results over.
_DROP = tl.constexpr("{ .reg .b32 m; prmt.b32 m, $2, 0, $3; and.b32 $0, $1, m; }")
_DROP_PAIR = tl.constexpr("{ .reg .b32 s, m; prmt.b32 s, $4, $5, 0x7650; prmt.b32 m, $2, $3, s; and.b32 $0, $1, m; }")


@triton.jit
def drop(x, kept):
    """x where it is kept and 0 elsewhere. x: (queries, KEYS); kept: from `kept_keys`, or None for all."""
    if kept is None:
        return x
    elif x.dtype.primitive_bitwidth == 16:
        word, byte = kept
        # The first word's byte for the lower half, the second's for the upper.
        operands = [x, word, byte * 0x1111 + 0xCC88]
        return tl.inline_asm_elementwise(_DROP_PAIR, "=r,r,r,r,r,r", operands, dtype=x.dtype, is_pure=True, pack=2)
    else:
        word, byte = kept
        operands = [x.to(tl.int32, bitcast=True), word, byte * 0x1111 + 0x8888]
        bits = tl.inline_asm_elementwise(_DROP, "=r,r,r,r", operands, dtype=tl.int32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)
