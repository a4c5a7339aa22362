"""The random bits of dropout, the same as `bertfast.reference.dropout_multiplier` bit for bit: Philox4x32-7.

One call of Philox gives four words of 32 bits, which serve eight columns of 16 bits each. A thread keeps the columns
that it draws: they come out of `tl.join` in its own registers, in the layout that 16-byte accesses have.
"""

import torch
import triton
import triton.language as tl

from bertfast import reference


def settings(p: float, seed: torch.Tensor | None) -> tuple[int, float]:
    """What a kernel is told of the probability: 16 bits below the first drop an element, the second scales the rest."""
    threshold = 0 if seed is None else reference.dropout_threshold(p)
    return threshold, 65536 / (65536 - threshold)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four uint32 words for each counter (c0, c1, c2, c3) of uint32. seed: int64, its halves are the key.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        # 64-bit products: one instruction gives both halves.
        left, right = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
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
def kept_keys(seed, threshold, query, head, sequence, first, shift, KEYS: tl.constexpr):
    """Which of the keys first .. first + KEYS are kept of each query's, (queries, KEYS) bool. KEYS divides
    64, or 64 divides it; it divides first.

    query, head: (queries,) int32. shift: of 64 keys the first 2^shift repeat, as those of heads that
    stand side by side do.

    A call of Philox serves eight keys that stand 8 apart, which are one thread's where a product of the matrix units
    has the keys as its columns. Each key says here which call and which lane of it are its own; that eight calls of a
    thread are the same and that their lanes are known is left to the compiler, which makes them one. Rows and columns
    of counters are broadcast where a round mixes them, so that the first two rounds cost next to nothing.
    """
    key = tl.arange(0, KEYS)
    group = (first >> 6) * 8 + (key >> 6) * 8 + (key & 7)
    w0, w1, w2, w3 = philox(
        seed,
        group[None, :].to(tl.uint32),
        query[:, None].to(tl.uint32),
        head[:, None].to(tl.uint32),
        sequence.to(tl.uint32),
    )
    if KEYS == 64:
        w1 = tl.where(shift == 4, w0, w1)
        w2, w3 = tl.where(shift == 6, w2, w0), tl.where(shift == 6, w3, w1)
    lane = ((key if KEYS >= 64 else first + key) >> 3)[None, :] & 7
    word = tl.where((lane & 4) != 0, tl.where((lane & 2) != 0, w3, w2), tl.where((lane & 2) != 0, w1, w0))
    # What stands below an upper half is too little to matter against a threshold with zeros there.
    drawn = tl.where((lane & 1) != 0, word, word << 16)
    return drawn >= (threshold.to(tl.uint32) << 16)
