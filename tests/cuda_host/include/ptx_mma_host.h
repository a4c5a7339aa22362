// The twins of csrc/cuda/ptx_mma.cuh. matrix_units.cpp has what they do, where its own memory is not checked.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../matrix_units.h"

namespace bertfast {
namespace {

template <class T>
T recompute(T value) {
    return value;
}

inline uint32_t shared_address(const void* pointer) { return cuda_host::shared_address(pointer); }

inline void copy_16_bytes(void* to, const void* from, bool wanted) { cuda_host::begin_copy(to, from, wanted); }
inline void end_copy_group() { cuda_host::end_copy_group(); }
template <int left>
void wait_for_copies() {
    cuda_host::wait_for_copies(left);
}

inline uint4 load_transposed(const void* row) {
    uint4 words;
    cuda_host::load_transposed(row, &words.x);
    return words;
}

template <class T>
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cuda_host::multiply_16x8x16(std::is_same_v<T, __half>, d, a, b0, b1);
}

}  // namespace
}  // namespace bertfast
