// The instructions that CUDA C++ has no name for, and what else only the device's compiler understands: all inline
// assembly of the kernels stands here. The tests run the kernels on the host, with twins of these functions.
#pragma once

#ifndef __CUDACC__
#include <ptx_host.h>  // tests/cuda_host
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace bertfast {
namespace {

// Two to the power of x, one instruction: relative error 2^-22, and 0 where the result would not be a normal number.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x, to one unit in the last place.
__device__ inline float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The smaller and the larger, NaN where either is: fminf and fmaxf would lose it.
__device__ inline float smaller(float a, float b) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
__device__ inline float larger(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// All 64 bits of a product. Of the plain one, nvcc 13 also adds the zeros that are the operands' upper halves.
__device__ inline uint64_t multiply_wide(uint32_t a, uint32_t b) {
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
}

// Two bytes of x, the lower one first: 16 bits of each, all like its highest.
template <int low, int high>
__device__ inline uint32_t spread_signs(uint32_t x) {
    uint32_t bits;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bits) : "r"(x), "n"(0x8888 + 0x11 * low + 0x1100 * high));
    return bits;
}

// nvcc splits the plain store in four where it stands in an unrolled loop.
__device__ inline void store_16_bytes(void* to, uint4 bits) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
}

// The shared memory that the launch has asked for.
template <class T>
__device__ T* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
}

// launch() lets a kernel start while the one before it still runs. Every thread of every kernel waits for the end of
// that one before it reads or writes global memory; nothing is won by being cleverer, and the wait hands the order
// on: when a kernel has ended, all before it have. Before sm_90 kernels never overlap, and both are nothing.
__device__ inline void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start where this one leaves room, once all its blocks have come here or ended.
__device__ inline void start_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace
}  // namespace bertfast

#endif
