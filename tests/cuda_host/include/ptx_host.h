// The twins of csrc/cuda/ptx.cuh: the same functions in C++. What a PTX instruction does with a warp or a warpgroup, or
// with memory by itself, is written with together() and check_access() of ../emulator.h.
#pragma once

#include <cuda_runtime.h>

namespace bertfast {
namespace {

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

inline float exp2_approx(float x) { return flush(std::exp2(flush(x))); }
inline float log2_approx(float x) { return std::log2(flush(x)); }
inline float reciprocal_approx(float x) { return flush(1.0f / flush(x)); }

inline float smaller(float a, float b) { return a != a || b != b ? NAN : std::fmin(a, b); }
inline float larger(float a, float b) { return a != a || b != b ? NAN : std::fmax(a, b); }

inline uint64_t multiply_wide(uint32_t a, uint32_t b) { return uint64_t{a} * b; }

template <int low, int high>
uint32_t spread_signs(uint32_t x) {
    return (x >> (8 * low + 7) & 1 ? 0xffffu : 0u) | (x >> (8 * high + 7) & 1 ? 0xffff0000u : 0u);
}

inline void store_16_bytes(void* to, uint4 bits) {
    cuda_host::check_access(to, 16, true, 16);
    std::memcpy(to, &bits, 16);
}

template <class T>
T* dynamic_shared() {
    return static_cast<T*>(cuda_host::dynamic_shared_memory());
}

inline void wait_for_predecessors() { cuda_host::wait_for_predecessors(); }
inline void start_dependents() {}

}  // namespace
}  // namespace bertfast
