// CUDA C++ as the host's compiler understands it: keywords, built-in variables and intrinsics.
#pragma once

#include "cuda_runtime_api.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// A block has the host's thread to itself, and the module has no other thread-local variables: so they lie side by
// side, where they can be filled with poison before every block. A section of their own would be the obvious place,
// but GCC leaves variables of templates out of it. `extern __shared__` cannot be had this way: use dynamic_shared().
#define __shared__ static thread_local

// The calling thread's: the scheduler writes them whenever it goes on with another.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define CUDA_HOST_VECTORS(type, scalar, bytes)                                                               \
    struct __align__(2 * bytes) type##2 { scalar x, y; };                                                    \
    struct __align__(4 * bytes > 16 ? 16 : 4 * bytes) type##4 { scalar x, y, z, w; };                        \
    inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; }                                     \
    inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(float, float, 4)
CUDA_HOST_VECTORS(int, int, 4)
CUDA_HOST_VECTORS(uint, unsigned, 4)
CUDA_HOST_VECTORS(ushort, unsigned short, 2)
CUDA_HOST_VECTORS(longlong, long long, 8)
#undef CUDA_HOST_VECTORS

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}

using std::isinf;
using std::isnan;

namespace cuda_host {
template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace cuda_host
inline float __uint_as_float(unsigned bits) { return cuda_host::bits_as<float>(bits); }
inline unsigned __float_as_uint(float value) { return cuda_host::bits_as<unsigned>(value); }
inline float __int_as_float(int bits) { return cuda_host::bits_as<float>(bits); }
inline int __float_as_int(float value) { return cuda_host::bits_as<int>(value); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled without contraction
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
template <class T>
T __ldg(const T* from) {
    return *from;
}

inline void __syncthreads() { cuda_host::barrier(0, 0, true, "__syncthreads"); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cuda_host {

template <class T>
struct Lane {
    T value;
    int source;  // -1: its own
    T result;
};

template <class T>
T shuffle(unsigned mask, const char* what, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the hardware shuffles");
    Lane<T> mine = {value, source, value};
    together(mask, what, mine, [](Lane<T>* const* all) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!all[lane]) continue;
            const int from = all[lane]->source < 0 ? lane : all[lane]->source;
            if (!all[from]) fail("lane %d shuffles from lane %d, which is not in the mask", lane, from);
            all[lane]->result = all[from]->value;
        }
    });
    return mine.result;
}

struct Vote {
    bool predicate;
    unsigned result;
};
inline unsigned ballot(unsigned mask, const char* what, bool predicate) {
    Vote mine = {predicate, 0};
    together(mask, what, mine, [](Vote* const* all) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (all[lane] && all[lane]->predicate) votes |= 1u << lane;
        for (int lane = 0; lane < 32; ++lane)
            if (all[lane]) all[lane]->result = votes;
    });
    return mine.result;
}
inline int lane() { return thread_number() % 32; }

}  // namespace cuda_host

inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::ballot(mask, "__syncwarp", false); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return cuda_host::ballot(mask, "__ballot_sync", predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
    return cuda_host::ballot(mask, "__any_sync", predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return cuda_host::ballot(mask, "__all_sync", predicate == 0) == 0;
}
// `width` cuts the warp into parts, and no lane looks beyond its own.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return cuda_host::shuffle(mask, "__shfl_sync", value, (cuda_host::lane() & -width) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int source = cuda_host::lane() ^ bits;
    return cuda_host::shuffle(mask, "__shfl_xor_sync", value, source / width > cuda_host::lane() / width ? -1 : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32) {
    const int source = cuda_host::lane() + distance;
    return cuda_host::shuffle(mask, "__shfl_down_sync", value,
                              source / width != cuda_host::lane() / width ? -1 : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32) {
    const int source = cuda_host::lane() - distance;
    const bool outside = source < (cuda_host::lane() & -width);
    return cuda_host::shuffle(mask, "__shfl_up_sync", value, outside ? -1 : source);
}
