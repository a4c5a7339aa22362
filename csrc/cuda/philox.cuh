// The random bits of dropout: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), the
// same on every backend.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace bertfast {
namespace {

struct Philox {
    uint32_t x[4];
};

// The four words of counter (c0, c1, c2, c3); the seed's halves are the key. Where calls share words of the counter,
// the compiler finds what they share of the first three rounds.
__device__ __forceinline__ Philox philox(int64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        const uint64_t left = multiply_wide(c0, 0xD2511F53u), right = multiply_wide(c2, 0xCD9E8D57u);
        c0 = static_cast<uint32_t>(right >> 32) ^ (c1 ^ key0);
        c1 = static_cast<uint32_t>(right);
        c2 = static_cast<uint32_t>(left >> 32) ^ (c3 ^ key1);
        c3 = static_cast<uint32_t>(left);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace
}  // namespace bertfast
