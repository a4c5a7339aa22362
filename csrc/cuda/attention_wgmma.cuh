// Attention of one head by a whole block, a warpgroup, on the tensor cores of sm_90a: for 65 to 128 tokens.
//
// mma.sync reaches little more than half of what these tensor cores can do, and takes every operand through registers:
// K and V once for each 16 queries. wgmma takes 64 queries at once, and all but the probabilities from shared memory.
// Below 65 tokens it would multiply mostly zeros, where mma.sync is far from being what the time goes into.
//
// Q, K and V come by cp.async, as elsewhere, and not by the bulk copies of sm_90. Those of one dimension cannot write a
// layout that wgmma reads, whose rows are cut into chunks of 16 bytes. Those of a tensor map can, and save some
// instructions; but a tensor map has to be made on the host for every call, and it knows where the batch ends and not
// where a sequence does: rows of the next one would have to be zeroed behind the copy, and published, before a product
// may read them. cp.async writes the same swizzled layout, and zeros where the sequence has ended.
#pragma once

#include "attention.cuh"
#include "ptx_wgmma.cuh"

namespace bertfast {
namespace {

template <class T, int head_size, int keys, bool dropout>
__device__ void attend_as_warpgroup(const AttentionArguments<T>& a, const Sequence& sequence, int part, T* shared) {
    constexpr int tiles = keys / 8, threads = 32 * warps, row_bytes = 2 * head_size;
    T *const q = shared, *const k = q + longest_sequence * head_size, *const v = k + keys * head_size;
    const T* const from = a.head_of(sequence);
    const auto copy = [&](T* to, int which, auto rows) {
        copy_rows<T, head_size, rows, threads>(to, from + which * a.part_stride, a.token_stride, sequence.length,
                                               threadIdx.x, swizzled<head_size>);
    };
    copy(q, 0, std::integral_constant<int, longest_sequence>());
    copy(k, 1, std::integral_constant<int, keys>());
    copy(v, 2, std::integral_constant<int, keys>());
    end_copy_group();
    const int64_t seed = dropout ? *a.seed : 0;
    wait_for_copies<0>();
    publish_to_products();
    __syncthreads();

    const uint64_t all_queries = describe<head_size>(q), all_keys = describe<head_size>(k);
    const uint64_t all_values = describe<head_size>(v);
    for (int block = 64 * part; block < sequence.length; block += 64 * a.parts) {
        const unsigned lane = recompute(threadIdx.x % 32);
        const int first = block + 16 * static_cast<int>(threadIdx.x / 32);
        float s[tiles][4];
        begin_products();
#pragma unroll
        for (int d = 0; d < head_size; d += 16)
            multiply_64x16<T>(s, advance(all_queries, block * row_bytes + 2 * d), advance(all_keys, 2 * d), d > 0);
        wait_for_products(s);
        RowSums rows = {};
        uint32_t p[tiles / 2][4] = {};
        // The warpgroup multiplies as one, but a warp whose 16 queries are behind the end need not do more.
        if (first < sequence.length) {
            rows = softmax(s, lane, sequence.length, a.scale_log2);
            round_to<T>(p, s);
            if constexpr (dropout) drop(p, lane, first, sequence, a.threshold, recompute(seed));
        }
        float o[head_size / 8][4];
        begin_products();
#pragma unroll
        for (int j = 0; j < keys; j += 16)
            multiply_64x16<T>(o, p[j / 16], advance(all_values, j * row_bytes), j > 0);
        wait_for_products(o);
        store<T, head_size>(o, rows, a, sequence, lane, first);
    }
}

}  // namespace
}  // namespace bertfast
