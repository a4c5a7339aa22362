// What the host side of every launcher needs: how rows are cut into chunks, and errors in words.
#pragma once

#include <initializer_list>

#include "kernels.h"

namespace bertfast {

constexpr int64_t shortest_chunk = 32, most_chunks = 256;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows of each chunk but the last, for `row_chunks`.
constexpr int64_t chunk_length(int64_t rows) {
    return rows == 0 ? shortest_chunk : shortest_chunk * divide_up(rows, shortest_chunk * most_chunks);
}

// Whether kernels of the current device may start before the one ahead of them has ended: from sm_90 on.
bool kernels_can_overlap();

// Throws std::runtime_error if the launch just made has failed: "bias_gelu_fwd of (65, 3072) bfloat16 failed on ...".
void check_launch(const char* op, DType dtype, std::initializer_list<int64_t> shape);

}  // namespace bertfast
