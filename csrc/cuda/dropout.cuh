// Dropout of [rows, cols] tensors: reference.dropout, bit for bit, and the same in the backward.
#pragma once

#include "philox.cuh"
#include "row.cuh"

namespace bertfast {
namespace {

struct Drawn {
    int64_t seed;
    uint32_t threshold;
    __device__ float scale() const { return 65536.0f / static_cast<float>(65536u - threshold); }

    // Which of the thread's elements of this row are kept, bit by bit. One call draws 16 bits for each of eight
    // neighbouring columns: for half precision those are the ones that the thread holds, for float32 they are twice
    // as many as it holds side by side, and elements that stand apart need a call each.
    template <class T, bool is_aligned>
    __device__ uint32_t kept(const Slice<T, is_aligned>& slice, int64_t row) const {
        constexpr int together = is_aligned ? per_thread<T> : 1;
        uint32_t bits = 0;
#pragma unroll(is_aligned ? held : 1)  // eight calls at once would take too many registers
        for (int e = 0; e < held; e += together) {
            const uint32_t column = slice.column(e), row_upper = static_cast<uint32_t>(row >> 32);
            const Philox drawn = philox(seed, column / 8, static_cast<uint32_t>(row), row_upper, 0);
#pragma unroll
            for (int i = 0; i < together; ++i) {
                const uint32_t lane = (column + i) % 8;
                // Not x[lane / 2]: an index that the compiler does not know would put x into memory.
                const uint32_t left = lane & 2 ? drawn.x[1] : drawn.x[0], right = lane & 2 ? drawn.x[3] : drawn.x[2];
                const uint32_t word = lane & 4 ? right : left;
                bits |= static_cast<uint32_t>((lane & 1 ? word >> 16 : word & 0xffffu) >= threshold) << (e + i);
            }
        }
        return bits;
    }

    // By multiplication, as in the reference: what is not finite stays so.
    __device__ void apply(uint32_t kept_bits, float (&values)[held]) const {
        const float kept_scale = scale();
        for (int e = 0; e < held; ++e) values[e] *= kept_bits >> e & 1 ? kept_scale : 0.0f;
    }
};

}  // namespace
}  // namespace bertfast
