// Vectors of float for one instruction set: the few operations that the kernels are written in.
//
// GCC's and Clang's vector extensions give arithmetic, comparison and selection on every target; intrinsics
// stand only where the compilers do not find the right instruction by themselves.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace bertfast::BERTFAST_ISA {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef int32_t VecI __attribute__((vector_size(4 * lanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * lanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * lanes)));

// The storage types: float, and bfloat16 as its 16 bits.
using bfloat16 = uint16_t;

BERTFAST_INLINE Vec splat(float value) { return value - Vec{}; }

BERTFAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

BERTFAST_INLINE Vec abs(Vec v) { return (Vec)((VecI)v & 0x7fffffff); }

// max(a, b) and min(a, b) where neither is NaN; b where either is, which is what the x86 instructions do.
BERTFAST_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
BERTFAST_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

BERTFAST_INLINE float reduce_add(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum[lanes];
    std::memcpy(sum, &v, sizeof v);
    for (int step = lanes / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) sum[i] += sum[i + step];
    return sum[0];
#endif
}

BERTFAST_INLINE float reduce_max(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float top[lanes];
    std::memcpy(top, &v, sizeof v);
    for (int step = lanes / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) top[i] = top[i] > top[i + step] ? top[i] : top[i + step];
    return top[0];
#endif
}

// bfloat16 is the upper half of a float. Narrowing rounds to nearest, ties to even; a NaN stays one, made quiet.
BERTFAST_INLINE Vec widen(VecHalf half) {
#if defined(__AVX512F__)
    const VecU bits = (VecU)_mm512_cvtepu16_epi32((__m256i)half);  // one instruction where GCC 12 finds four
#elif defined(__AVX2__)
    const VecU bits = (VecU)_mm256_cvtepu16_epi32((__m128i)half);
#else
    const VecU bits = __builtin_convertvector(half, VecU);
#endif
    return (Vec)(bits << 16);
}

BERTFAST_INLINE VecHalf narrow(Vec v) {
    const VecU bits = (VecU)v;
    const VecU rounding = 0x7fffu + ((bits >> 16) & 1u);
#if defined(__AVX512F__)
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    const __m512i quiet = (__m512i)(bits | 0x400000u);
    const __m512i rounded = _mm512_mask_add_epi32(quiet, number, (__m512i)bits, (__m512i)rounding);
    return (VecHalf)_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#else
    const VecU result = (v == v ? bits + rounding : bits | 0x400000u) >> 16;
#if defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)result, (__m256i)result);
    return (VecHalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(result, VecHalf);
#endif
#endif
}

BERTFAST_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
BERTFAST_INLINE Vec load(const bfloat16* p) {
    VecHalf half;
    std::memcpy(&half, p, sizeof half);
    return widen(half);
}
BERTFAST_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
BERTFAST_INLINE void store(bfloat16* p, Vec v) {
    const VecHalf half = narrow(v);
    std::memcpy(p, &half, sizeof half);
}

// The first n lanes, 0 <= n < lanes: the others load as `rest` and are not stored.
BERTFAST_INLINE Vec load(const float* p, int n, float rest = 0) {
#if defined(__AVX512F__)
    return (Vec)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), (__mmask16)((1u << n) - 1), p);
#else
    float whole[lanes];
    for (int i = 0; i < lanes; ++i) whole[i] = i < n ? p[i] : rest;
    return load(whole);
#endif
}
BERTFAST_INLINE Vec load(const bfloat16* p, int n, float rest = 0) {
    bfloat16 whole[lanes];
    store(whole, splat(rest));
    for (int i = 0; i < n; ++i) whole[i] = p[i];
    return load(whole);
}
BERTFAST_INLINE void store(float* p, Vec v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
BERTFAST_INLINE void store(bfloat16* p, Vec v, int n) {
    const VecHalf half = narrow(v);
    for (int i = 0; i < n; ++i) p[i] = half[i];
}

// Calls f(j, All()) for each whole vector of `columns` columns, j its first column, and f(j, First{n}) for the n
// columns that remain: one body for both, with load(p + j, n), store(p + j, v, n) and keep(v, n) inside.
struct All {};
struct First {
    int n;
};
template <class T>
BERTFAST_INLINE Vec load(const T* p, All) {
    return load(p);
}
template <class T>
BERTFAST_INLINE Vec load(const T* p, First first) {
    return load(p, first.n);
}
template <class T>
BERTFAST_INLINE void store(T* p, Vec v, All) {
    store(p, v);
}
template <class T>
BERTFAST_INLINE void store(T* p, Vec v, First first) {
    store(p, v, first.n);
}
BERTFAST_INLINE Vec keep(Vec v, All) { return v; }
BERTFAST_INLINE Vec keep(Vec v, First first) {
    float kept[lanes] = {};
    store(kept, v, first.n);
    return load(kept);
}
template <class F>
BERTFAST_INLINE void for_columns(int64_t columns, F f) {
    int64_t j = 0;
    for (; j + lanes <= columns; j += lanes) f(j, All());
    if (j < columns) f(j, First{static_cast<int>(columns - j)});
}

// 2^x for x < 128 or NaN. 2^k p(r) with x = k + r, |r| <= 1/2, and p a polynomial fitted for the least relative
// error (9e-8 before rounding) with p(0) = 1. Results that would be denormal are 0, which spares the
// multiplications that follow the processor's slow path; so exp2(-inf) == 0 exactly, and a NaN stays one.
BERTFAST_INLINE Vec exp2(Vec x) {
    const float smallest = -125.4f;
#if defined(__AVX512F__)
    const Vec k = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23, so that the sum's last bits are k
    const Vec k = shifted - 12582912.0f;
#endif
    const Vec r = x - k;
    Vec p = splat(0.00132646592f);
    p = fma(p, r, splat(0.00967156617f));
    p = fma(p, r, splat(0.0555073458f));
    p = fma(p, r, splat(0.240222412f));
    p = fma(p, r, splat(0.693146974f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(smallest), _CMP_NLT_UQ);
    return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)k);
#else
    const VecI power = ((VecI)shifted - 0x4b400000 + 127) << 23;
    return x < smallest ? Vec{} : p * (Vec)power;
#endif
}

// e^x. 2^k p(r) with x = k ln 2 + r, |r| <= ln 2 / 2, and p a polynomial fitted for the least relative error
// (9e-8 before rounding) with p(0) = 1. Results that would be denormal are 0, which spares the multiplications
// that follow the processor's slow path; so exp(-inf) == 0 exactly, exp(inf) == inf, and a NaN stays one.
BERTFAST_INLINE Vec exp(Vec x) {
    const float smallest = -86.9f, largest = 89.0f;
    const float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    const Vec clamped = min(splat(largest), x);
#if defined(__AVX512F__)
    const Vec k = (Vec)_mm512_roundscale_ps((__m512)(clamped * log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Vec shifted = fma(clamped, splat(log2e), splat(12582912.0f));  // 1.5 * 2^23: the sum's last bits are k
    const Vec k = shifted - 12582912.0f;
#endif
    Vec r = fma(k, splat(-ln2_high), clamped);
    r = fma(k, splat(-ln2_low), r);
    Vec p = splat(0.00829027221f);
    p = fma(p, r, splat(0.0418981612f));
    p = fma(p, r, splat(0.166676387f));
    p = fma(p, r, splat(0.499991477f));
    p = fma(p, r, splat(0.999999702f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(smallest), _CMP_NLT_UQ);
    return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)k);
#else
    // 2 * 2^(k - 1), because 2^128 is no float although e^88.7 is one.
    const VecI power = ((VecI)shifted - 0x4b400000 + 126) << 23;
    return x < smallest ? Vec{} : p * (Vec)power * 2.0f;
#endif
}

}  // namespace bertfast::BERTFAST_ISA
