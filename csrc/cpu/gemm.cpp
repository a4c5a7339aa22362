// gemm: out = activation(x W^T + bias) + residual, in float32, bfloat16 or int8, on packed weights.
//
// One micro-kernel for the three: a tile of `rows` x `panels` panels of 16 columns stays in registers while the depth
// runs through it word by word, a word being four bytes of a row of x (1, 2 or 4 elements), broadcast, against the same
// word of each column's weights. The weights lie in the order in which this reads them (weights.h), so a panel is one
// stream from memory; x is read where it is.
//
// A task is a block of rows and of panels such that both stay in the second-level cache, taken in pieces of the depth
// for the same reason. Sums of a tile go through a small buffer in the first-level cache to the epilogue, which adds the
// bias, takes GELU, adds the residual and rounds once.
#include "gelu.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "weights.h"

namespace bertfast::BERTFAST_ISA {
namespace {

enum Slot { sums_slot = 7 };

constexpr int panel_vecs = panel_columns / lanes;
// As many accumulators as leave registers for a row of weights and the broadcast word.
#if defined(__AVX512F__)
constexpr int max_rows = 14, tile_panels = 2;
#elif defined(__AVX2__)
constexpr int max_rows = 6, tile_panels = 1;
#elif defined(__aarch64__)
constexpr int max_rows = 6, tile_panels = 1;
#else
constexpr int max_rows = 3, tile_panels = 1;
#endif
// How far ahead of its use a panel is fetched: 32 words of depth.
constexpr int prefetch_words = 32 * panel_columns;
constexpr int tile_vecs = tile_panels * panel_vecs, tile_columns = tile_panels * panel_columns;

BERTFAST_INLINE VecU load_words(const uint32_t* p) {
    VecU v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
BERTFAST_INLINE VecU splat_word(uint32_t word) { return VecU{} + word; }

// sum + x . w for each lane's word, and how a sum becomes float.
struct Float32 {
    using Sum = Vec;
    static constexpr bool quantised = false;
    BERTFAST_INLINE Vec dot(Vec sum, VecU x, VecU w) { return fma((Vec)x, (Vec)w, sum); }
};

struct Bfloat16 {
    using Sum = Vec;
    static constexpr bool quantised = false;
    BERTFAST_INLINE Vec dot(Vec sum, VecU x, VecU w) {
#if defined(__AVX512BF16__)
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
        sum = fma((Vec)(x << 16), (Vec)(w << 16), sum);
        return fma((Vec)(x & 0xffff0000u), (Vec)(w & 0xffff0000u), sum);
#endif
    }
};

struct Int8 {
    using Sum = VecI;
    static constexpr bool quantised = true;
    BERTFAST_INLINE VecI dot(VecI sum, VecU x, VecU w) {
#if defined(__AVX512VNNI__)
        return (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__AVX512BW__)
        const __m512i low = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)w, 8), 8);
        const __m512i even = _mm512_madd_epi16((__m512i)(x & 0x00ff00ffu), low);
        const __m512i odd = _mm512_madd_epi16((__m512i)((x >> 8) & 0x00ff00ffu), _mm512_srai_epi16((__m512i)w, 8));
        return sum + (VecI)_mm512_add_epi32(even, odd);
#elif defined(__AVX2__)
        const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)w, 8), 8);
        const __m256i even = _mm256_madd_epi16((__m256i)(x & 0x00ff00ffu), low);
        const __m256i odd = _mm256_madd_epi16((__m256i)((x >> 8) & 0x00ff00ffu), _mm256_srai_epi16((__m256i)w, 8));
        return sum + (VecI)_mm256_add_epi32(even, odd);
#else
        for (int byte = 0; byte < 4; ++byte)
            sum += (VecI)(x >> (8 * byte) & 0xffu) * ((VecI)(w << (24 - 8 * byte)) >> 24);
        return sum;
#endif
    }
};

// sums[m][n] (+)= x . w over `words` words. x: rows of words; w: a panel's words, the next panel `panel` words on.
template <class Kind, int rows>
void multiply_tile(int64_t words, const unsigned char* x, int64_t stride, const uint32_t* w, int64_t panel,
                   uint32_t* sums, bool accumulate) {
    using Sum = typename Kind::Sum;
    Sum sum[rows][tile_vecs];
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < tile_vecs; ++n)
            sum[m][n] = accumulate ? (Sum)load_words(sums + m * tile_columns + n * lanes) : Sum{};
    for (int64_t k = 0; k < words; ++k) {
        VecU weights[tile_vecs];
#pragma GCC unroll 8
        for (int n = 0; n < tile_vecs; ++n) {
            const uint32_t* const p = w + n / panel_vecs * panel + k * panel_columns + n % panel_vecs * lanes;
            weights[n] = load_words(p);
            if (n % panel_vecs == 0) __builtin_prefetch(p + prefetch_words);
        }
#pragma GCC unroll 16
        for (int m = 0; m < rows; ++m) {
            uint32_t word;
            std::memcpy(&word, x + m * stride + 4 * k, sizeof word);
            const VecU factor = splat_word(word);
#pragma GCC unroll 8
            for (int n = 0; n < tile_vecs; ++n) sum[m][n] = Kind::dot(sum[m][n], factor, weights[n]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < tile_vecs; ++n)
            std::memcpy(sums + m * tile_columns + n * lanes, &sum[m][n], sizeof sum[m][n]);
}

template <class Kind, int rows>
void multiply_rows(int64_t count, int64_t words, const unsigned char* x, int64_t stride, const uint32_t* w,
                   int64_t panel, uint32_t* sums, bool accumulate) {
    if (count == rows)
        multiply_tile<Kind, rows>(words, x, stride, w, panel, sums, accumulate);
    else if constexpr (rows > 1)
        multiply_rows<Kind, rows - 1>(count, words, x, stride, w, panel, sums, accumulate);
}

BERTFAST_INLINE Vec activate(Vec v, Activation activation) {
    if (activation == Activation::gelu) return ErfForm::value(v);
    return activation == Activation::gelu_tanh ? TanhForm::value(v) : v;
}

// Takes a tile's sums to the output: rows [row, row + count), columns [column, column + columns).
template <class Kind, class T>
void finish(const Gemm& g, int64_t row, int64_t count, int64_t column, int64_t columns, const uint32_t* sums) {
    for (int64_t m = 0; m < count; ++m) {
        T* const out = static_cast<T*>(g.out) + (row + m) * g.out_stride + column;
        const float* const residual = g.residual ? g.residual + (row + m) * g.residual_stride + column : nullptr;
        for_columns(columns, [&](int64_t j, auto n) {
            const VecU raw = load_words(sums + m * tile_columns + j);
            Vec v;
            if constexpr (Kind::quantised) {
                VecI shift;
                const Vec totals = load(reinterpret_cast<const float*>(g.weight_sums) + column + j, n);
                std::memcpy(&shift, &totals, sizeof shift);
                v = __builtin_convertvector((VecI)raw - shift * g.x.zero[row + m], Vec);
                v *= load(g.weight_scale + column + j, n) * g.x.scale[row + m];
            } else {
                v = (Vec)raw;
            }
            if (g.bias) v += load(g.bias + column + j, n);
            v = activate(v, g.activation);
            if (residual) v += load(residual + j, n);
            store(out + j, v, n);
        });
    }
}

// A piece of the depth such that two panels' stay in the first levels of the cache, beside the rows'.
constexpr int64_t max_words = 1024;
// Rows and panels of a task.
constexpr int64_t max_tiles = 8;

template <class Kind>
void multiply(const Gemm& g, int threads) {
    const int64_t words = words_for(g.x.operand, g.depth), panel = words * panel_columns;
    const int64_t tiles = (g.rows + max_rows - 1) / max_rows;
    const int64_t pairs = (g.cols + tile_columns - 1) / tile_columns;
    const int64_t row_blocks = (tiles + max_tiles - 1) / max_tiles;
    const int64_t pieces = (words + max_words - 1) / max_words;
    int64_t width = 8;
    while (width > 1 && row_blocks * ((pairs + width - 1) / width) < 4 * threads) width /= 2;
    const int64_t column_blocks = (pairs + width - 1) / width;
    const uint32_t* const weight = static_cast<const uint32_t*>(g.weight);
    const unsigned char* const x = static_cast<const unsigned char*>(g.x.data);
    const auto run = g.out_dtype == DType::float32 ? finish<Kind, float> : finish<Kind, bfloat16>;
    parallel_for(row_blocks * column_blocks, threads, [&](int64_t task) {
        const int64_t row_block = task % row_blocks, column_block = task / row_blocks;
        const int64_t first_tile = row_block * tiles / row_blocks, last_tile = (row_block + 1) * tiles / row_blocks;
        const int64_t first_pair = column_block * pairs / column_blocks;
        const int64_t last_pair = (column_block + 1) * pairs / column_blocks;
        constexpr int64_t tile_size = max_rows * tile_columns;
        uint32_t* const buffer = scratch<uint32_t>(
            sums_slot, pieces > 1 ? (last_tile - first_tile) * (last_pair - first_pair) * tile_size : tile_size);
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t k = piece * words / pieces, end = (piece + 1) * words / pieces;
            uint32_t* sums = buffer;
            for (int64_t pair = first_pair; pair < last_pair; ++pair) {
                const uint32_t* const w = weight + pair * tile_panels * panel + k * panel_columns;
                for (int64_t tile = first_tile; tile < last_tile; ++tile) {
                    const int64_t row = tile * g.rows / tiles, count = (tile + 1) * g.rows / tiles - row;
                    multiply_rows<Kind, max_rows>(count, end - k, x + row * g.x.stride + 4 * k, g.x.stride, w, panel,
                                                  sums, piece > 0);
                    if (piece + 1 == pieces) {
                        const int64_t column = pair * tile_columns, rest = g.cols - column;
                        run(g, row, count, column, rest < tile_columns ? rest : tile_columns, sums);
                    }
                    if (pieces > 1) sums += tile_size;
                }
            }
        }
    });
}

}  // namespace

void gemm_fwd(const Gemm& g, int threads) {
    if (g.x.operand == Operand::float32)
        multiply<Float32>(g, threads);
    else if (g.x.operand == Operand::bfloat16)
        multiply<Bfloat16>(g, threads);
    else
        multiply<Int8>(g, threads);
}

}  // namespace bertfast::BERTFAST_ISA
