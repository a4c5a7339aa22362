// Small matrix products C = A B, in cache and summed in float32: what attention.cpp does most of the time.
//
// One idea carries every product of the forward and the backward: a tile of C, `tile_rows` x `tile_vecs` vectors,
// stays in registers for the whole depth of the product. A step of the depth is a word of four bytes: a float, or a
// pair of bfloat16 where the processor multiplies those. It reads tile_vecs vectors of one row of B and broadcasts a
// word of each of tile_rows rows of A, so that a load feeds several multiply-adds and the FMA units, not the caches,
// set the pace. Vectors run along the columns of B and C; A is only ever broadcast: P and P^T are the same memory.
#pragma once

#include <utility>

#include "simd.h"

namespace bertfast::BERTFAST_ISA {

// The accumulators take most registers (28 of 32 with AVX-512, 12 of 16 below it), and are enough to hide the
// latency of the FMAs.
constexpr int tile_rows = lanes == 16 ? 14 : 6;
constexpr int tile_vecs = 2;
constexpr int tile_cols = tile_vecs * lanes;
// Rows of a tile that is one vector wide.
constexpr int column_rows = lanes > tile_rows ? lanes : tile_rows;

// For methods and lambdas: one that is called would take a whole tile out of the registers.
#define BERTFAST_METHOD __attribute__((always_inline))

BERTFAST_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

BERTFAST_INLINE VecU load_words(const void* p) {
    VecU v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// What a product multiplies: the type of an element, how many of them are a word, and sum + x . w for each lane's word.
// words() are the next n elements of a row, at most a vector of words, filled up with zeros. pack() makes words along
// the columns instead: a row of dst of `elements` rows of src. narrow() stores a result as elements.
struct Floats {
    using Element = float;
    static constexpr int64_t elements = 1;

    BERTFAST_INLINE Vec dot(Vec sum, VecU x, VecU w) { return fma((Vec)x, (Vec)w, sum); }

    template <class T>
    BERTFAST_INLINE Vec words(const T* src, int64_t n) {
        return n == lanes ? load(src) : load(src, static_cast<int>(n));
    }

    // dst[i, :cols] = src[i, :cols] as float, with zeros up to the next multiple of `lanes`, where rows of dst begin.
    template <class T>
    static void pack(const T* src, int64_t stride, int64_t rows, int64_t cols, float* dst) {
        const int64_t width = round_up(cols, lanes);
        for (int64_t i = 0; i < rows; ++i, src += stride, dst += width)
            for_columns(cols, [&](int64_t j, auto n) { store(dst + j, load(src + j, n)); });
    }

    // dst[0, 2 lanes) = (a, b), in dst's type; and dst[0, lanes) = a.
    template <class T>
    BERTFAST_INLINE void narrow(T* dst, Vec a, Vec b) {
        store(dst, a);
        store(dst + lanes, b);
    }
    template <class T>
    BERTFAST_INLINE void narrow(T* dst, Vec a) {
        store(dst, a);
    }
};

#if defined(__AVX512BF16__)
// Its instructions take denormals as zeros and make none.
struct Pairs {
    using Element = bfloat16;
    static constexpr int64_t elements = 2;

    BERTFAST_INLINE Vec dot(Vec sum, VecU x, VecU w) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
    }

    BERTFAST_INLINE Vec words(const bfloat16* src, int64_t n) {
        return (Vec)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), src);
    }

    // dst[i, j] = (src[2i, j], src[2i + 1, j]), the latter 0 beyond the last row; likewise beyond the last column.
    static void pack(const bfloat16* src, int64_t stride, int64_t rows, int64_t cols, float* dst) {
        const int64_t width = round_up(cols, lanes);
        for (int64_t i = 0; i < rows; i += 2, src += 2 * stride, dst += width)
            for (int64_t j = 0; j < cols; j += lanes) {
                const int64_t n = cols - j < lanes ? cols - j : lanes;
                const __mmask16 present = static_cast<__mmask16>((1u << n) - 1);
                const __mmask16 second = i + 1 < rows ? present : __mmask16{0};
                const VecU even = (VecU)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, src + j));
                const VecU odd = (VecU)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, src + stride + j));
                store(dst + j, (Vec)(even | odd << 16));
            }
    }

    BERTFAST_INLINE void narrow(bfloat16* dst, Vec a, Vec b) {
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        std::memcpy(dst, &both, sizeof both);
    }
    BERTFAST_INLINE void narrow(bfloat16* dst, Vec a) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512)a);
        std::memcpy(dst, &half, sizeof half);
    }
};
#endif

// A: word (m, k) is at data + m * row + k * column, in bytes; the words of a row, or of a column, are neighbours.
struct ByRows {
    const void* data;
    int64_t row;
    static constexpr int64_t column = 4;
};
struct ByColumns {
    const void* data;
    int64_t column;
    static constexpr int64_t row = 4;
};
struct MatrixB {                      // word (k, n) at data[n / tile_cols * panel + k * row + n % tile_cols]
    const float* data;
    int64_t row, panel;
};

// A matrix of words whose rows are `row` of them apart, and its transpose.
BERTFAST_INLINE ByRows by_rows(const float* data, int64_t row) { return {data, 4 * row}; }
BERTFAST_INLINE ByColumns by_columns(const float* data, int64_t row) { return {data, 4 * row}; }

// Rows of B may also stand one behind another, as usual: a panel is then just the next tile_cols columns.
BERTFAST_INLINE MatrixB row_major(const float* data, int64_t row) { return {data, row, tile_cols}; }

// Where C goes: begin() is what lanes [n, n + lanes) of its row m start from, end() takes the sums from column n on.
struct Sums {                         // += where `accumulate`
    float* data;
    int64_t row;
    bool accumulate = false;

    BERTFAST_METHOD Vec begin(int64_t m, int64_t n) const { return accumulate ? load(data + m * row + n) : Vec{}; }
    template <int vecs>
    BERTFAST_METHOD void end(int64_t m, int64_t n, const Vec (&sum)[vecs]) const {
        for (int i = 0; i < vecs; ++i) store(data + m * row + n + i * lanes, sum[i]);
    }
};
struct Scaled {
    float* data;
    int64_t row;
    float factor;

    BERTFAST_METHOD Vec begin(int64_t, int64_t) const { return Vec{}; }
    template <int vecs>
    BERTFAST_METHOD void end(int64_t m, int64_t n, const Vec (&sum)[vecs]) const {
        for (int i = 0; i < vecs; ++i) store(data + m * row + n + i * lanes, sum[i] * factor);
    }
};

template <class Kind, int rows, int vecs, class A, class C>
void multiply_tile(int64_t words, const A& a, const MatrixB& b, const C& c, int64_t row, int64_t col) {
    Vec sum[rows][vecs];
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < vecs; ++n) sum[m][n] = c.begin(row + m, col + n * lanes);
    const char* const from = static_cast<const char*>(a.data) + row * a.row;
    for (int64_t k = 0; k < words; ++k) {
        VecU line[vecs];
#pragma GCC unroll 8
        for (int n = 0; n < vecs; ++n) line[n] = load_words(b.data + k * b.row + n * lanes);
#pragma GCC unroll 16
        for (int m = 0; m < rows; ++m) {
            uint32_t word;
            std::memcpy(&word, from + m * a.row + k * a.column, sizeof word);
            const VecU factor = VecU{} + word;
#pragma GCC unroll 8
            for (int n = 0; n < vecs; ++n) sum[m][n] = Kind::dot(sum[m][n], factor, line[n]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) c.end(row + m, col, sum[m]);
}

// multiply_tile for a number of rows from 1 on.
template <class Kind, int vecs, class A, class C, int... i>
auto tile_of(int64_t rows, std::integer_sequence<int, i...>) {
    using Tile = decltype(&multiply_tile<Kind, 1, vecs, A, C>);
    static constexpr Tile tiles[] = {multiply_tile<Kind, i + 1, vecs, A, C>...};
    return tiles[rows - 1];
}

template <class Kind, int vecs, int max_rows, class A, class C>
void multiply_panel(int64_t rows, int64_t words, const A& a, const MatrixB& b, const C& c, int64_t col) {
    const int64_t tiles = (rows + max_rows - 1) / max_rows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = tile * rows / tiles, count = (tile + 1) * rows / tiles - row;
        tile_of<Kind, vecs, A, C>(count, std::make_integer_sequence<int, max_rows>())(words, a, b, c, row, col);
    }
}

// C[rows, cols] = A[rows, words] B[words, cols]. Columns are taken in whole vectors: B is read and C is written up to
// the next multiple of `lanes`. Rows are divided evenly among tiles. An element's sum runs over the depth in order,
// whatever tile it falls in, so that neither this nor splitting the rows among calls changes a bit.
template <class Kind = Floats, class A, class C>
void multiply(int64_t rows, int64_t cols, int64_t words, const A& a, MatrixB b, const C& c) {
    for (int64_t col = 0; col < cols; col += tile_cols) {
        if (cols - col <= lanes)
            multiply_panel<Kind, 1, column_rows>(rows, words, a, b, c, col);
        else
            multiply_panel<Kind, tile_vecs, tile_rows>(rows, words, a, b, c, col);
        b.data += b.panel;
    }
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

// Lane i of the result is row i of the square, reduced: over halves of the row, then over halves of those.
template <int half, class Reduce, int... i>
BERTFAST_INLINE Vec reduce_rows(Vec* square, Reduce reduce, std::integer_sequence<int, i...> lane) {
#pragma GCC unroll 16
    for (int r = 0; r < half; ++r) {
        const Vec upper = square[r], lower = square[r + half];
        square[r] = reduce(shuffle<(i & half ? i - half + lanes : i)...>(upper, lower),
                           shuffle<(i & half ? i + lanes : i + half)...>(upper, lower));
    }
    if constexpr (half > 1) return reduce_rows<half / 2>(square, reduce, lane);
    return square[0];
}
template <class Reduce>
BERTFAST_INLINE Vec reduce_rows(Vec* square, Reduce reduce) {
    return reduce_rows<lanes / 2>(square, reduce, std::make_integer_sequence<int, lanes>());
}

// The transpose of src[rows, cols], as a MatrixB of the words of `cols` in panels of tile_cols columns: every tile
// then reads its panel from the first byte to the last. Columns from `rows` to the next multiple of `lanes` are 0.
template <class Kind = Floats, class T>
MatrixB pack_transposed(const T* src, int64_t stride, int64_t rows, int64_t cols, float* dst) {
    constexpr int64_t step = lanes * Kind::elements;
    const int64_t words = (cols + Kind::elements - 1) / Kind::elements;
    const MatrixB result = {dst, tile_cols, words * tile_cols};
    for (int64_t row = 0; row < rows; row += lanes) {
        float* out = dst + row / tile_cols * result.panel + row % tile_cols;
        for (int64_t word = 0; word < words; word += lanes) {
            const int64_t height = rows - row < lanes ? rows - row : lanes;
            const int64_t width = words - word < lanes ? words - word : lanes;
            const int64_t col = word * Kind::elements, n = cols - col < step ? cols - col : step;
            Vec square[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i)
                square[i] = i < height ? Kind::words(src + (row + i) * stride + col, n) : Vec{};
            transpose<lanes / 2>(square, std::make_integer_sequence<int, lanes>());
            for (int i = 0; i < width; ++i) store(out + (word + i) * tile_cols, square[i]);
        }
    }
    return result;
}

}  // namespace bertfast::BERTFAST_ISA
