// The random bits of dropout: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//
// Key: the seed's two halves. Counter: (group of columns, c1, c2, c3), where (c1, c2, c3) is (row, row >> 32, 0) in a
// [rows, columns] tensor and (query, head, sequence) in attention, whose columns are the keys. The four words of one
// counter are the 16-bit numbers of eight neighbours in a [rows, columns] tensor, lower half first, and the bytes of
// sixteen keys in attention, which stand as GPUs hand scores to a thread. Every backend draws the same bits, so that a
// mask is the same on any device and is recomputed in the backward rather than stored.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace bertfast::BERTFAST_ISA {

// Counters go two 32-bit words to a 64-bit lane: the multiplier reads the lower half of a lane and fills all of
// it, so a round needs no shuffles. Upper halves hold leftovers that nothing reads.
typedef uint64_t VecLong __attribute__((vector_size(4 * lanes)));
constexpr int counters = lanes / 2;

BERTFAST_INLINE VecLong multiply_lower(VecLong a, uint32_t b) {
#if defined(__AVX512F__)
    return (VecLong)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (VecLong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (VecLong)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xffffffffu) * b;
#endif
}

struct Words {
    VecLong x[4];  // in the lower halves
};

// The words of the counters (c0 .. c0 + counters - 1, c1, c2, c3).
BERTFAST_INLINE Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    VecLong x0, x1 = VecLong{} + c1, x2 = VecLong{} + c2, x3 = VecLong{} + c3;
    for (int i = 0; i < counters; ++i) x0[i] = static_cast<uint32_t>(c0 + i);
    for (int round = 0; round < 7; ++round) {
        const VecLong product0 = multiply_lower(x0, 0xD2511F53u), product1 = multiply_lower(x2, 0xCD9E8D57u);
        x0 = (product1 >> 32) ^ x1 ^ key0;
        x1 = product1;
        x2 = (product0 >> 32) ^ x3 ^ key1;
        x3 = product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{x0, x1, x2, x3}};
}

// out[j] = 0 where numbers[j] is below the threshold, else 65536 / (65536 - threshold), for j in [0, n).
BERTFAST_INLINE void multipliers_of(Dropout dropout, const uint16_t* numbers, float* out, int64_t n) {
    const Vec scale = splat(65536.0f / static_cast<float>(65536u - dropout.threshold));
    const VecI threshold = VecI{} + static_cast<int32_t>(dropout.threshold);
    for (int64_t j = 0; j < n; j += lanes) {
        VecHalf drawn;
        std::memcpy(&drawn, numbers + j, sizeof drawn);
        const Vec multiplier = __builtin_convertvector(drawn, VecI) < threshold ? Vec{} : scale;
        if (n - j >= lanes)
            store(out + j, multiplier);
        else
            store(out + j, multiplier, static_cast<int>(n - j));
    }
}

// The multipliers of row `row` of a [rows, columns] tensor.
BERTFAST_INLINE void dropout_row(Dropout dropout, int64_t row, float* out, int64_t columns) {
    constexpr int width = 8 * counters;
    alignas(64) uint16_t numbers[width];
    for (int64_t j = 0; j < columns; j += width) {
        const Words words = philox(dropout.seed, static_cast<uint32_t>(j / 8), static_cast<uint32_t>(row),
                                   static_cast<uint32_t>(row >> 32), 0);
        const VecLong first = (words.x[0] & 0xffffffffu) | (words.x[1] << 32);
        const VecLong second = (words.x[2] & 0xffffffffu) | (words.x[3] << 32);
        for (int i = 0; i < counters; ++i) {
            const uint64_t pair[2] = {first[i], second[i]};
            std::memcpy(numbers + 8 * i, pair, sizeof pair);
        }
        multipliers_of(dropout, numbers, out + j, columns - j < width ? columns - j : width);
    }
}

// The multipliers of a row of attention's probabilities: those of `query` for the keys [0, keys).
BERTFAST_INLINE void dropout_keys(Dropout dropout, uint32_t query, uint32_t head, uint32_t sequence, float* out,
                                  int64_t keys) {
    // Key 64 b + 16 w + 8 h + 2 r + i has byte 2 h + i of word w of counter 4 b + r: as the upper one of its number, so
    // that two neighbours, i = 0 and 1, are 32 bits.
    typedef uint32_t Pairs __attribute__((vector_size(4 * counters)));
    constexpr int width = counters > 4 ? 16 * counters : 64, together = counters < 4 ? counters : 4;
    alignas(64) uint16_t numbers[width];
    for (int64_t j = 0; j < keys; j += width) {
        for (int group = 0; group < width / 16; group += counters) {
            const Words words = philox(dropout.seed, static_cast<uint32_t>(j / 16 + group), query, head, sequence);
            for (int w = 0; w < 4; ++w) {
                const VecLong x = words.x[w];
                for (int h = 0; h < 2; ++h) {
                    const Pairs pairs = __builtin_convertvector(
                        h ? (x >> 8 & 0xff00u) | (x & 0xff000000u) : (x & 0xffu) << 8 | (x & 0xff00u) << 16, Pairs);
                    for (int i = 0; i < counters; i += together)
                        std::memcpy(numbers + (group + i) / 4 * 64 + 16 * w + 8 * h + (group + i) % 4 * 2,
                                    reinterpret_cast<const uint32_t*>(&pairs) + i, 4 * together);
                }
            }
        }
        multipliers_of(dropout, numbers, out + j, keys - j < width ? keys - j : width);
    }
}

}  // namespace bertfast::BERTFAST_ISA
