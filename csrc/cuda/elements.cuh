// Elements of float32, bfloat16 and float16, as they lie in memory and as the floats that everything is computed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace bertfast {
namespace {

constexpr int lanes = 32;  // of a warp

// Elements in the 16 bytes that a thread loads at once.
template <class T>
constexpr int per_thread = 16 / sizeof(T);

// Whether rows of `cols` elements at these addresses (null ones are not there) can be read 16 bytes at a time.
template <class T, class... Pointers>
bool aligned(int64_t cols, Pointers... pointers) {
    return cols % per_thread<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// 16 bytes as they lie in memory to floats, and back, rounded to nearest even. By the word: taking 16-bit values out of
// registers would cost instructions, and registers.
template <class T>
__device__ void unpack(uint4 bits, float (&to)[per_thread<T>]) {
    const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) {
            to[i] = __uint_as_float(words[i]);
        } else if constexpr (std::is_same_v<T, __half>) {
            const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
            to[2 * i] = pair.x;
            to[2 * i + 1] = pair.y;
        } else {  // a bfloat16 is the upper half of a float
            to[2 * i] = __uint_as_float(words[i] << 16);
            to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
}

template <class T>
__device__ uint4 pack(const float (&from)[per_thread<T>]) {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>)
            words[i] = __float_as_uint(from[i]);
        else if constexpr (std::is_same_v<T, __half>)
            reinterpret_cast<__half2&>(words[i]) = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
        else
            reinterpret_cast<__nv_bfloat162&>(words[i]) = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace
}  // namespace bertfast
