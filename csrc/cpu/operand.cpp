// operand: the rows that the next GEMM multiplies, rounded to bfloat16 or quantised where that is what it takes, in the
// pass that computes LayerNorm where there is one. A row stays in the first-level cache for all of its passes.
#include <cfloat>
#include <cmath>

#include "kernels.h"
#include "layer_norm.h"
#include "parallel.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int row_slot = 1;

// Lanes of whole numbers 0 .. 255, to bytes.
BERTFAST_INLINE void store_bytes(uint8_t* p, Vec numbers, int count) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtps_epi32((__m512)numbers);
    _mm_mask_storeu_epi8(p, (__mmask16)((1u << count) - 1), _mm512_cvtepi32_epi8(wide));
#else
    for (int i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(static_cast<int32_t>(numbers[i]));
#endif
}

BERTFAST_INLINE int lanes_in(All) { return lanes; }
BERTFAST_INLINE int lanes_in(First first) { return first.n; }

// u = round(value / scale) + zero, with a scale and a zero such that 0 .. 255 span the row's values and 0. The scale is
// 0 for a row of zeros, or of values so small that 1 / scale overflows.
void quantise(const float* row, int64_t cols, uint8_t* out, float* scale, int32_t* zero) {
    Vec lowest = {}, highest = {}, check = {};
    for_columns(cols, [&](int64_t j, auto n) {
        const Vec v = load(row + j, n);
        lowest = min(v, lowest);
        highest = max(v, highest);
        check = fma(v, Vec{}, check);
    });
    const float low = -reduce_max(-lowest), high = reduce_max(highest), strange = reduce_add(check);
    const float step = high / 255 - low / 255, inverse = 1 / step;
    const bool usable = strange == 0 && inverse <= FLT_MAX;
    *scale = usable ? step : strange;
    *zero = 0;
    if (!usable) {
        for (int64_t j = 0; j < cols; ++j) out[j] = 0;
        return;
    }
    const float offset = std::nearbyint(-low * inverse);
    *zero = static_cast<int32_t>(offset);
    // Adding and taking away 1.5 * 2^23 rounds to nearest, ties to even.
    constexpr float shift = 12582912.0f;
    for_columns(cols, [&](int64_t j, auto n) {
        const Vec rounded = (load(row + j, n) * inverse + shift) - shift + offset;
        store_bytes(out + j, max(Vec{}, min(splat(255.0f), rounded)), lanes_in(n));
    });
}

template <class T>
void copy(const float* row, T* out, int64_t cols) {
    for_columns(cols, [&](int64_t j, auto n) { store(out + j, load(row + j, n), n); });
}

// Row `i` of the operand, from a float row with room for whole vectors.
void put(const OperandRows& rows, int64_t i, const float* row, int64_t cols) {
    unsigned char* const out = static_cast<unsigned char*>(rows.data) + i * rows.stride;
    if (rows.operand == Operand::float32) {
        copy(row, reinterpret_cast<float*>(out), cols);
    } else if (rows.operand == Operand::bfloat16) {
        copy(row, reinterpret_cast<bfloat16*>(out), cols);
        if (cols % 2) reinterpret_cast<bfloat16*>(out)[cols] = 0;
    } else {
        quantise(row, cols, out, rows.scale + i, rows.zero + i);
        for (int64_t j = cols; j % 4; ++j) out[j] = 0;
    }
}

template <class T>
void forward(const OperandOf& p, int threads) {
    parallel_rows(p.rows, p.cols, threads, [&](int64_t begin, int64_t end) {
        float* const row = scratch<float>(row_slot, padded(p.cols));
        for (int64_t i = begin; i < end; ++i) {
            const T* const x = static_cast<const T*>(p.x) + i * p.x_stride;
            Vec sum = {};
            for_columns(p.cols, [&](int64_t j, auto n) {
                const Vec v = load(x + j, n);
                store(row + j, v);
                sum += v;
            });
            if (p.weight) {
                const Statistics s = statistics(row, reduce_add(sum), p.cols, p.eps);
                for_columns(p.cols, [&](int64_t j, auto n) {
                    const Vec xhat = (load(row + j) - s.mean) * s.rstd;
                    store(row + j, fma(xhat, load(p.weight + j, n), load(p.bias + j, n)));
                });
            }
            if (p.out && p.out_dtype == DType::float32) copy(row, static_cast<float*>(p.out) + i * p.out_stride, p.cols);
            if (p.out && p.out_dtype == DType::bfloat16)
                copy(row, static_cast<bfloat16*>(p.out) + i * p.out_stride, p.cols);
            if (p.rows_out.data) put(p.rows_out, i, row, p.cols);
        }
    });
}

}  // namespace

void operand_fwd(const OperandOf& p, int threads) {
    p.dtype == DType::float32 ? forward<float>(p, threads) : forward<bfloat16>(p, threads);
}

}  // namespace bertfast::BERTFAST_ISA
