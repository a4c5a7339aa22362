// __half on the host, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;

    __half() = default;
    explicit __half(float value) {
        const uint32_t word = __float_as_uint(value), sign = word >> 16 & 0x8000, size = word & 0x7fffffff;
        uint32_t rounded;
        if (size > 0x7f800000)
            rounded = 0x7fff;  // NaN
        else if (size >= 0x477ff000)
            rounded = 0x7c00;  // rounds to more than 65504
        else if (size < 0x38800000)  // to a multiple of 2^-24: that is the unit in the last place of 0.5 to 1
            rounded = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000;
        else  // rebias the exponent; a carry out of the mantissa raises it
            rounded = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
        bits = static_cast<uint16_t>(sign | rounded);
    }
    operator float() const {
        const uint32_t sign = (bits & 0x8000u) << 16, size = (bits & 0x7fffu) << 13;
        if (size >= 0x0f800000) return __uint_as_float(sign | (size + 0x70000000));
        // 2^112 rebiases the exponent, of subnormal numbers too.
        return __uint_as_float(sign | __float_as_uint(__uint_as_float(size) * 0x1p112f));
    }
};
struct __align__(4) __half2 {
    __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
