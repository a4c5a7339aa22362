// Sums over the rows of a tensor, the same bits whatever the number of threads.
//
// The rows are cut into chunks by their number alone; each chunk has its own float32 partial sums, and the
// partial sums are added in the order of the chunks. Rows, chunks and columns are all summed in a fixed order,
// and no chunk is long, which keeps the rounding error near that of pairwise summation.
#pragma once

#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace bertfast::BERTFAST_ISA {

// Scratch slot of the partial sums; the rows that a kernel works on take other slots.
constexpr int partial_sums_slot = 0;

constexpr int64_t shortest_chunk = 16, most_chunks = 128;

// Calls add_row(row, sums) once for each row; sums[k * stride + j] is where it adds to sum k of column j. Then
// writes sum k to outputs[k], unless that is null.
template <class T, class F>
static void column_sums(int64_t rows, int64_t columns, int threads, int count, void* const* outputs, F add_row) {
    const int64_t even = (rows + most_chunks - 1) / most_chunks;
    const int64_t chunk = even < shortest_chunk ? shortest_chunk : even;
    const int64_t chunks = (rows + chunk - 1) / chunk;
    const int64_t stride = (columns + lanes - 1) / lanes * lanes;
    float* const partial = scratch<float>(partial_sums_slot, chunks * count * stride);
    if (rows * columns < 16384) threads = 1;

    parallel_for(chunks, threads, [&](int64_t i) {
        float* const sums = partial + i * count * stride;
        std::memset(sums, 0, sizeof(float) * count * stride);
        const int64_t end = (i + 1) * chunk < rows ? (i + 1) * chunk : rows;
        for (int64_t row = i * chunk; row < end; ++row) add_row(row, sums);
    });

    constexpr int64_t slice = 64;
    parallel_for((columns + slice - 1) / slice, threads, [&](int64_t s) {
        const int64_t begin = s * slice, width = begin + slice < columns ? slice : columns - begin;
        for (int k = 0; k < count; ++k) {
            if (!outputs[k]) continue;
            T* const out = static_cast<T*>(outputs[k]) + begin;
            const float* const first = partial + k * stride + begin;
            for_columns(width, [&](int64_t j, auto n) {
                Vec sum = {};
                for (int64_t i = 0; i < chunks; ++i) sum += load(first + i * count * stride + j, n);
                store(out + j, sum, n);
            });
        }
    });
}

}  // namespace bertfast::BERTFAST_ISA
