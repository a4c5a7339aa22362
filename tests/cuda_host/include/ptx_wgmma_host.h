// The twins of csrc/cuda/ptx_wgmma.cuh: see ptx_mma_host.h.
#pragma once

#include "ptx_mma_host.h"

namespace bertfast {
namespace {

constexpr bool has_wgmma = true;

inline void trap() { cuda_host::fail("trap"); }

inline void publish_to_products() { cuda_host::publish_to_products(); }
inline void begin_products() { cuda_host::begin_products(); }
template <int tiles>
void wait_for_products(float (&)[tiles][4]) {
    cuda_host::wait_for_products();
}

template <class T, int tiles>
void multiply_64x16(float (&d)[tiles][4], uint64_t a, uint64_t b, bool accumulate) {
    cuda_host::multiply_64x16({std::is_same_v<T, __half>, accumulate, false, tiles, d[0], nullptr, a, b});
}
template <class T, int tiles>
void multiply_64x16(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    cuda_host::multiply_64x16({std::is_same_v<T, __half>, accumulate, true, tiles, d[0], a, 0, b});
}

}  // namespace
}  // namespace bertfast
