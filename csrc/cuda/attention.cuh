// What one warp does with 16 queries of one head, on either kind of tensor core: softmax, dropout and the stores.
//
// Scores, probabilities and outputs stand in registers as the matrix units leave them, in tiles of 16 rows by 8
// columns: with g = lane / 4 and c = lane % 4 a thread holds of tile j
//     row g:     columns 8 j + 2 c and 8 j + 2 c + 1 in tile[j][0] and [1]
//     row g + 8: the same columns                    in tile[j][2] and [3].
// A row belongs to the four lanes of one g. Two tiles of probabilities, rounded, are just what the second product takes
// as its left operand of 16 x 16: the probabilities never leave the registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "philox.cuh"
#include "ptx.cuh"
#include "ptx_mma.cuh"

namespace bertfast {
namespace {

constexpr int longest_sequence = 128, warps = 4;  // of a block

__host__ __device__ constexpr int heads_of_a_block(int length) { return length <= 32 ? 4 : length <= 64 ? 2 : 1; }

// The sequence that a block works on, and the head of the calling warp.
struct Sequence {
    int index, start, length;                                  // length 0 where the warp has no head
    int head;
};

template <class T>
struct AttentionArguments {
    const T* qkv;                                              // [tokens, 3, heads, head_size]
    int64_t token_stride, part_stride, head_stride;
    const int32_t *cu_seqlens, *order;                         // [sequences + 1], [sequences] or null
    T* out;                                                    // [tokens, heads, head_size]
    float* lse;                                                // [heads, tokens] or null
    int64_t tokens;
    int heads, max_length;
    unsigned groups, parts;                                    // of heads, of queries: see the kernel
    float scale_log2;                                          // |scale| log2(e): scores are exponents of 2
    uint32_t signs;                                            // of two elements, flipped in q: a negative scale's
    float multiplier;                                          // of what dropout keeps
    uint32_t threshold;                                        // of dropout, in each byte
    const int64_t* seed;

    // Its first query.
    __device__ const T* head_of(const Sequence& sequence) const {
        return qkv + sequence.start * token_stride + sequence.head * head_stride;
    }
};

template <class T>
__device__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    }
}

// What the rows g and g + 8 of a thread need to the end: 1 / sum, and the log-sum-exp.
struct RowSums {
    float maximum[2], sum[2];  // the sum over this thread's columns alone
};

// Scores, not yet scaled, to 2^(score - maximum), in place. Columns from `length` on become 0. No scale is negative.
template <int tiles>
__device__ RowSums softmax(float (&s)[tiles][4], unsigned lane, int length, float scale_log2) {
    // Which columns can lie beyond the end is known at compile time: a block has chosen `tiles` by the length.
    constexpr int sure = tiles == 2 ? 0 : tiles <= 8 ? tiles / 2 : tiles - 4;
    if (length < 8 * tiles) {
        const int column = static_cast<int>(lane % 4 * 2);
#pragma unroll
        for (int j = sure; j < tiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (8 * j + column + i % 2 >= length) s[j][i] = -INFINITY;
    }
    RowSums rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // A score that is not a number is lost here, and comes back with its own 2^(score - maximum).
        float top = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
        for (int j = 1; j < tiles; ++j) top = fmaxf(top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float shift = top * scale_log2;
        float even = 0, odd = 0;
#pragma unroll
        for (int j = 0; j < tiles; ++j) {
            even += s[j][2 * r] = exp2_approx(fmaf(s[j][2 * r], scale_log2, -shift));
            odd += s[j][2 * r + 1] = exp2_approx(fmaf(s[j][2 * r + 1], scale_log2, -shift));
        }
        rows.maximum[r] = shift;
        rows.sum[r] = even + odd;
    }
    return rows;
}

// Probabilities as left operands, each of 16 keys.
template <class T, int tiles>
__device__ void round_to(uint32_t (&operands)[tiles / 2][4], const float (&p)[tiles][4]) {
#pragma unroll
    for (int k = 0; k < tiles / 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            operands[k][i] = pack<T>(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
}

// The bytes of x that are not below those of `threshold`, in their highest bits: four comparisons at once. A byte is that
// where its highest bit says so against the threshold's, and where these are the same its other bits do.
__device__ inline uint32_t not_below(uint32_t x, uint32_t threshold) {
    const uint32_t others = (x | 0x80808080u) - (threshold & 0x7f7f7f7fu);
    return (x & others) | ((x | others) & ~threshold);
}

// Zeroes the probabilities that dropout takes away. The sixteen keys of 64 that one Philox call serves are a thread's
// own: of each operand a pair of neighbours in either half. Its word has a byte for each of the four.
template <int operands>
__device__ void drop(uint32_t (&p)[operands][4], unsigned lane, int first_query, const Sequence& sequence,
                     uint32_t threshold, int64_t seed) {
#pragma unroll
    for (int block = 0; block < operands; block += 4) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t query = first_query + lane / 4 + 8 * r;
            const Philox words = philox(seed, block + lane % 4, query, sequence.head, sequence.index);
#pragma unroll
            for (int k = 0; k < 4 && block + k < operands; ++k) {
                const uint32_t kept = not_below(words.x[k], threshold);
                p[block + k][r] &= spread_signs<0, 1>(kept);
                p[block + k][2 + r] &= spread_signs<2, 3>(kept);
            }
        }
    }
}

// Writes o / sum for the queries from first_query on that are in the sequence, and their log-sum-exp.
template <class T, int head_size>
__device__ void store(const float (&o)[head_size / 8][4], const RowSums& rows, const AttentionArguments<T>& a,
                      const Sequence& sequence, unsigned lane, int first_query) {
    const unsigned odd = lane % 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int query = first_query + static_cast<int>(lane / 4) + 8 * r;
        float sum = rows.sum[r];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float factor = a.multiplier * reciprocal_approx(sum);
        const int64_t token = sequence.start + query;
        T* const to = a.out + (token * a.heads + sequence.head) * head_size + lane % 4 / 2 * 4;
#pragma unroll
        for (int j = 0; j < head_size / 8; j += 2) {
            // Lanes 0 and 1, and 2 and 3, swap a pair of columns: each then has four neighbours, and the warp writes
            // whole sectors of 32 bytes.
            const uint32_t left = pack<T>(o[j][2 * r] * factor, o[j][2 * r + 1] * factor);
            const uint32_t right = pack<T>(o[j + 1][2 * r] * factor, o[j + 1][2 * r + 1] * factor);
            const uint32_t swapped = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
            const uint2 four = odd ? make_uint2(swapped, right) : make_uint2(left, swapped);
            if (query < sequence.length) *reinterpret_cast<uint2*>(to + 8 * (j + odd)) = four;
        }
        if (a.lse && lane % 4 == 0 && query < sequence.length)
            a.lse[sequence.head * a.tokens + token] = (rows.maximum[r] + log2_approx(sum)) * 0.693147181f;
    }
}

// Where 16 bytes `chunk` of a row lie in shared memory, in elements: such that one chunk of eight rows, which ldmatrix
// reads at once, meets all banks. It is what wgmma calls a swizzle of 128 or, with a head size of 32, of 64 bytes.
template <int head_size>
__device__ unsigned swizzled(unsigned row, unsigned chunk) {
    return row * head_size + 8 * (chunk ^ (head_size == 64 ? row % 8 : row / 2 % 4));
}

// This thread's part of copying `keys` rows, of which those from `length` on become 0: their probabilities are 0, and
// times what happens to stand there that might still be NaN.
template <class T, int head_size, int keys, int threads, class Place>
__device__ void copy_rows(T* to, const T* from, int64_t stride, int length, int thread, Place place) {
    constexpr int chunks = head_size / 8;
    static_assert(threads % chunks == 0);
    const int chunk = thread % chunks;
    from += chunk * 8 + thread / chunks * stride;
#pragma unroll
    for (int i = 0; i < keys * chunks / threads; ++i) {
        const int row = thread / chunks + i * (threads / chunks);
        copy_16_bytes(to + place(row, chunk), from, row < length);
        from += threads / chunks * stride;
    }
}

}  // namespace
}  // namespace bertfast
