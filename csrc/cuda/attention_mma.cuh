// Attention of one head by some of a block's warps, on the tensor cores of sm_80 and later: mma.sync.
#pragma once

#include "attention.cuh"

namespace bertfast {
namespace {

// As `swizzled`, for K, of which the lanes that read at once want 64 bytes, four chunks, of two rows. With a head size
// of 32 these lie one behind the other.
template <int head_size>
__device__ unsigned place_of_key(unsigned row, unsigned chunk) {
    return row * head_size + 8 * (chunk ^ (head_size == 64 ? row % 2 * 4 : 0));
}

// 16 queries as left operands of the products with keys. Which elements of a head meet in one product is free, as long
// as both sides agree: this thread brings 16 bytes of a row to each pair of products, so that rows of Q come straight
// from global memory, and rows of K from shared memory, 16 bytes at a time. queries[p][r] are rows g and g + 8.
template <class T, int head_size>
__device__ void load_queries(uint4 (&queries)[head_size / 32][2], const AttentionArguments<T>& a,
                             const Sequence& sequence, unsigned lane, int first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first + static_cast<int>(lane / 4) + 8 * r;
        const T* const q = a.head_of(sequence) + row * a.token_stride;
#pragma unroll
        for (int p = 0; p < head_size / 32; ++p) {
            queries[p][r] = make_uint4(0, 0, 0, 0);
            if (row < sequence.length) queries[p][r] = *reinterpret_cast<const uint4*>(q + 32 * p + lane % 4 * 8);
        }
    }
}

template <class T, int head_size, int tiles>
__device__ void multiply_keys(float (&s)[tiles][4], const uint4 (&queries)[head_size / 32][2], uint32_t signs,
                              const T* keys, unsigned lane) {
    // The operands lie across what was loaded: this is where the compiler would move words about for each product. That
    // they change on the way, or may change, makes it do so once.
    uint32_t q[head_size / 16][4];
#pragma unroll
    for (int p = 0; p < head_size / 32; ++p)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint4 words = queries[p][r];
            q[2 * p][r] = words.x ^ signs, q[2 * p][r + 2] = words.y ^ signs;
            q[2 * p + 1][r] = words.z ^ signs, q[2 * p + 1][r + 2] = words.w ^ signs;
        }
    const T* from[head_size / 32];
#pragma unroll
    for (int p = 0; p < head_size / 32; ++p) from[p] = keys + place_of_key<head_size>(lane / 4, 4 * p + lane % 4);
#pragma unroll
    for (int j = 0; j < tiles; ++j) {
        s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
#pragma unroll
        for (int p = 0; p < head_size / 32; ++p) {
            const uint4 k = *reinterpret_cast<const uint4*>(from[p] + 8 * j * head_size);
            multiply_16x8x16<T>(s[j], q[2 * p], k.x, k.y);
            multiply_16x8x16<T>(s[j], q[2 * p + 1], k.z, k.w);
        }
    }
}

template <class T, int head_size, int tiles>
__device__ void multiply_values(float (&o)[head_size / 8][4], const uint32_t (&p)[tiles / 2][4], const T* values,
                                unsigned lane) {
    // Matrices: keys 0..7 and 8..15 of columns 8 j, then both of columns 8 (j + 1).
    const T* from[head_size / 16];
#pragma unroll
    for (int j = 0; j < head_size / 16; ++j)
        from[j] = values + swizzled<head_size>(lane % 16, 2 * j + lane / 16);
#pragma unroll
    for (int j = 0; j < head_size / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0;
#pragma unroll
    for (int k = 0; k < tiles / 2; ++k) {
#pragma unroll
        for (int j = 0; j < head_size / 8; j += 2) {
            const uint4 v = load_transposed(from[j / 2] + 16 * k * head_size);
            multiply_16x8x16<T>(o[j], p[k], v.x, v.y);
            multiply_16x8x16<T>(o[j + 1], p[k], v.z, v.w);
        }
    }
}

// The work of a warp whose head has at most `keys` tokens. All warps of a block come here with sequences alike.
template <class T, int head_size, int keys, bool dropout>
__device__ void attend(const AttentionArguments<T>& a, const Sequence& sequence, int part, T* shared) {
    constexpr int warps_of_a_head = warps / heads_of_a_block(keys), tiles = keys / 8;
    const int warp = threadIdx.x / 32 % warps_of_a_head, thread = threadIdx.x % (32 * warps_of_a_head);
    const T* const q = a.head_of(sequence);
    T* const k = shared + threadIdx.x / (32 * warps_of_a_head) * (2 * keys * head_size);
    T* const v = k + keys * head_size;
    copy_rows<T, head_size, keys, 32 * warps_of_a_head>(k, q + a.part_stride, a.token_stride, sequence.length, thread,
                                                        place_of_key<head_size>);
    copy_rows<T, head_size, keys, 32 * warps_of_a_head>(v, q + 2 * a.part_stride, a.token_stride, sequence.length,
                                                        thread, swizzled<head_size>);
    end_copy_group();

    int64_t seed = dropout ? *a.seed : 0;
    unsigned lane = threadIdx.x % 32;
    int first = 16 * (warp + part * warps_of_a_head);
    uint4 queries[head_size / 32][2];
    load_queries<T, head_size>(queries, a, sequence, lane, first);
    wait_for_copies<0>();
    __syncthreads();
    while (first < sequence.length) {
        lane = recompute(lane), seed = recompute(seed);
        float s[tiles][4];
        multiply_keys<T, head_size>(s, queries, a.signs, k, lane);
        const RowSums rows = softmax(s, lane, sequence.length, a.scale_log2);
        uint32_t p[tiles / 2][4];
        round_to<T>(p, s);
        if constexpr (dropout) drop(p, lane, first, sequence, a.threshold, seed);
        // The next queries come while these meet the values, when registers are free for them.
        const int next = first + 16 * warps_of_a_head * a.parts;
        load_queries<T, head_size>(queries, a, sequence, lane, next);
        float o[head_size / 8][4];
        multiply_values<T, head_size, tiles>(o, p, v, lane);
        store<T, head_size>(o, rows, a, sequence, lane, first);
        first = next;
    }
}

}  // namespace
}  // namespace bertfast
