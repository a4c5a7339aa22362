// Small matrix products C = A B (+ C), all in float32 and in cache: what attention.cpp does most of the time.
//
// One idea carries every product of the forward and the backward: a tile of C, `tile_rows` x `tile_vecs` vectors,
// stays in registers for the whole depth of the product. Each step reads tile_vecs vectors of one row of B and
// broadcasts tile_rows elements of one column of A, so that a load feeds several multiply-adds and the FMA units,
// not the caches, set the pace. Vectors run along the columns of B and C; A is only ever broadcast, and may
// therefore have any strides: P and P^T are the same memory.
#pragma once

#include <utility>

#include "simd.h"

namespace bertfast::BERTFAST_ISA {

// The accumulators take most registers (24 of 32 with AVX-512, 12 of 16 below it), and are enough to hide the
// latency of the FMAs.
constexpr int tile_rows = 6;
constexpr int tile_vecs = lanes == 16 ? 4 : 2;
constexpr int tile_cols = tile_vecs * lanes;

BERTFAST_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct MatrixA {                      // element (m, k) at data[m * row + k * column]
    const float* data;
    int64_t row, column;
};
struct MatrixB {                      // element (k, n) at data[n / tile_cols * panel + k * row + n % tile_cols]
    const float* data;
    int64_t row, panel;
};
struct MatrixC {                      // element (m, n) at data[m * row + n]
    float* data;
    int64_t row;
};

// Rows of B may also stand one behind another, as usual: a panel is then just the next tile_cols columns.
BERTFAST_INLINE MatrixB row_major(const float* data, int64_t row) { return {data, row, tile_cols}; }

template <int rows, int vecs>
void multiply_tile(int64_t depth, MatrixA a, MatrixB b, MatrixC c, bool accumulate) {
    Vec sum[rows][vecs];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < vecs; ++n) sum[m][n] = accumulate ? load(c.data + m * c.row + n * lanes) : Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[vecs];
#pragma GCC unroll 8
        for (int n = 0; n < vecs; ++n) row[n] = load(b.data + k * b.row + n * lanes);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
            const Vec factor = splat(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 8
            for (int n = 0; n < vecs; ++n) sum[m][n] = fma(factor, row[n], sum[m][n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < vecs; ++n) store(c.data + m * c.row + n * lanes, sum[m][n]);
}

template <int rows, int vecs>
void multiply_last_rows(int64_t m, int64_t depth, MatrixA a, MatrixB b, MatrixC c, bool accumulate) {
    if (m == rows)
        multiply_tile<rows, vecs>(depth, a, b, c, accumulate);
    else if constexpr (rows > 1)
        multiply_last_rows<rows - 1, vecs>(m, depth, a, b, c, accumulate);
}

template <int vecs>
void multiply_panel(int64_t rows, int64_t n, int64_t depth, MatrixA a, MatrixB b, MatrixC c, bool accumulate) {
    if constexpr (vecs > 1)
        if (n <= (vecs - 1) * lanes) return multiply_panel<vecs - 1>(rows, n, depth, a, b, c, accumulate);
    for (; rows >= tile_rows; rows -= tile_rows) {
        multiply_tile<tile_rows, vecs>(depth, a, b, c, accumulate);
        a.data += tile_rows * a.row;
        c.data += tile_rows * c.row;
    }
    if (rows > 0) multiply_last_rows<tile_rows - 1, vecs>(rows, depth, a, b, c, accumulate);
}

// C[rows, cols] = A[rows, depth] B[depth, cols], or += where `accumulate`. Columns are taken in whole vectors: B
// is read and C is written up to the next multiple of `lanes`. An element's sum runs over the depth in order,
// whatever tile it falls in, so that splitting the rows among calls changes no bit.
static void multiply(int64_t rows, int64_t cols, int64_t depth, MatrixA a, MatrixB b, MatrixC c,
                     bool accumulate = false) {
    for (; cols > 0; cols -= tile_cols) {
        multiply_panel<tile_vecs>(rows, cols, depth, a, b, c, accumulate);
        b.data += b.panel;
        c.data += tile_cols;
    }
}

// dst[i, :cols] = src[i, :cols] as float, with zeros up to the next multiple of `lanes`, where rows of dst begin.
template <class T>
void pack(const T* src, int64_t stride, int64_t rows, int64_t cols, float* dst) {
    const int64_t width = round_up(cols, lanes);
    for (int64_t i = 0; i < rows; ++i, src += stride, dst += width)
        for_columns(cols, [&](int64_t j, auto n) { store(dst + j, load(src + j, n)); });
}

template <int... index>
BERTFAST_INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, index...);
#else
    return __builtin_shuffle(a, b, VecI{index...});
#endif
}

// Transposes a square of lanes x lanes by exchanging its off-diagonal quarters, then theirs, and so on.
template <int half, int... i>
BERTFAST_INLINE void transpose(Vec* square, std::integer_sequence<int, i...> lane) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) {
        if (r & half) continue;
        const Vec upper = square[r], lower = square[r + half];
        square[r] = shuffle<(i & half ? i - half + lanes : i)...>(upper, lower);
        square[r + half] = shuffle<(i & half ? i + lanes : i + half)...>(upper, lower);
    }
    if constexpr (half > 1) transpose<half / 2>(square, lane);
}

// The transpose of factor * src[rows, cols], as a MatrixB of `cols` rows in panels of tile_cols columns: every tile
// then reads its panel from the first byte to the last. Columns from `rows` to the next multiple of `lanes` are 0.
template <class T>
MatrixB pack_transposed(const T* src, int64_t stride, int64_t rows, int64_t cols, float factor, float* dst) {
    const MatrixB result = {dst, tile_cols, cols * tile_cols};
    for (int64_t row = 0; row < rows; row += lanes) {
        float* out = dst + row / tile_cols * result.panel + row % tile_cols;
        for (int64_t col = 0; col < cols; col += lanes) {
            const int64_t height = rows - row < lanes ? rows - row : lanes;
            const int64_t width = cols - col < lanes ? cols - col : lanes;
            Vec square[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) {
                const T* p = src + (row + i) * stride + col;
                if (i >= height)
                    square[i] = Vec{};
                else
                    square[i] = splat(factor) * (width == lanes ? load(p) : load(p, static_cast<int>(width)));
            }
            transpose<lanes / 2>(square, std::make_integer_sequence<int, lanes>());
            for (int i = 0; i < width; ++i) store(out + (col + i) * tile_cols, square[i]);
        }
    }
    return result;
}

}  // namespace bertfast::BERTFAST_ISA
