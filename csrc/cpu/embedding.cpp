// embed_layer_norm: out = dropout(LayerNorm(word[ids] + position[position_ids] + type[token_type_ids])), and its
// gradients. See layer_norm.h for the rows and table_gradient() for the tables.
#include <cstring>

#include "column_sums.h"
#include "dropout.h"
#include "kernels.h"
#include "layer_norm.h"
#include "parallel.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int z_slot = 1, multiplier_slot = 2, dz_slot = 3, order_slot = 4, starts_slot = 5, used_slot = 6;

BERTFAST_INLINE bool outside(int64_t id, int64_t size) { return id < 0 || id >= size; }

int64_t first_outside(const EmbedLayerNorm& p) {
    for (int64_t t = 0; t < p.tokens; ++t)
        if (outside(p.ids[t], p.vocab) || outside(p.position_ids[t], p.positions) ||
            outside(p.token_type_ids ? p.token_type_ids[t] : 0, p.types))
            return t;
    return -1;
}

// Fills z = word + type + position of token t. Returns sum(z).
template <class T>
BERTFAST_INLINE float embedding_row(const EmbedLayerNorm& p, int64_t t, float* z) {
    const T* const word = static_cast<const T*>(p.word) + p.ids[t] * p.hidden;
    const T* const position = static_cast<const T*>(p.position) + p.position_ids[t] * p.hidden;
    const T* const type = static_cast<const T*>(p.type) + (p.token_type_ids ? p.token_type_ids[t] * p.hidden : 0);
    Vec sum = {};
    for_columns(p.hidden, [&](int64_t j, auto n) {
        const Vec v = load(word + j, n) + load(type + j, n) + load(position + j, n);
        store(z + j, v);
        sum += v;
    });
    return reduce_add(sum);
}

template <class T>
void forward(const EmbedLayerNorm& p, int threads) {
    const T* const weight = static_cast<const T*>(p.weight);
    const T* const bias = static_cast<const T*>(p.bias);
    parallel_rows(p.tokens, p.hidden, threads, [&](int64_t begin, int64_t end) {
        float* const z = scratch<float>(z_slot, padded(p.hidden));
        float* const multiplier = scratch<float>(multiplier_slot, padded(p.hidden));
        for (int64_t t = begin; t < end; ++t) {
            const float sum = embedding_row<T>(p, t, z);
            const Statistics s = statistics(z, sum, p.hidden, p.eps);
            if (p.mean) p.mean[t] = s.mean;
            if (p.rstd) p.rstd[t] = s.rstd;
            if (p.dropout.threshold) dropout_row(p.dropout, t, multiplier, p.hidden);
            T* const out = static_cast<T*>(p.out) + t * p.hidden;
            for_columns(p.hidden, [&](int64_t j, auto n) {
                const Vec xhat = (load(z + j) - s.mean) * s.rstd;
                Vec y = fma(xhat, load(weight + j, n), load(bias + j, n));
                if (p.dropout.threshold) y *= load(multiplier + j, n);
                store(out + j, y, n);
            });
        }
    });
}

// dtable[row] = sum of dz[t] over the tokens t with ids[t] == row, in the order of the tokens; other rows 0.
//
// The tokens are brought into the order of their ids by a counting sort, so that a table row is summed in
// registers and written once: no float32 copy of a bfloat16 table, no atomics, and the same bits whatever the
// number of threads. Rows that occur are shared out in pieces of a few columns, because a table can have only
// two of them (the token types), with half of all tokens each.
template <class T>
void table_gradient(const float* dz, const int64_t* ids, int64_t tokens, int64_t hidden, int64_t rows, T* dtable,
                    int threads) {
    int64_t* const order = scratch<int64_t>(order_slot, tokens);
    int64_t* const starts = scratch<int64_t>(starts_slot, rows + 2);  // of row r: starts[r] .. starts[r + 1]
    int64_t* const used = scratch<int64_t>(used_slot, rows);
    std::memset(starts, 0, sizeof(int64_t) * (rows + 2));
    const auto id = [&](int64_t t) { return ids ? ids[t] : 0; };
    for (int64_t t = 0; t < tokens; ++t) ++starts[id(t) + 2];
    int64_t used_rows = 0;
    for (int64_t r = 0; r < rows; ++r) {
        if (starts[r + 2]) used[used_rows++] = r;
        starts[r + 2] += starts[r + 1];
    }
    for (int64_t t = 0; t < tokens; ++t) order[starts[id(t) + 1]++] = t;

    parallel_rows(rows, hidden, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            if (starts[r] == starts[r + 1]) std::memset(dtable + r * hidden, 0, sizeof(T) * hidden);
    });

    constexpr int64_t width = 8 * lanes, group = 16;
    const int64_t slices = (hidden + width - 1) / width, groups = (used_rows + group - 1) / group;
    parallel_for(groups * slices, tokens * hidden < 16384 ? 1 : threads, [&](int64_t i) {
        const int64_t first = i / slices * group, last = first + group < used_rows ? first + group : used_rows;
        const int64_t column = i % slices * width, columns = column + width < hidden ? width : hidden - column;
        for (int64_t u = first; u < last; ++u) {
            const int64_t r = used[u];
            Vec sums[8] = {};
            for (int64_t k = starts[r]; k < starts[r + 1]; ++k) {
                const float* const from = dz + order[k] * padded(hidden) + column;
                for (int v = 0; v < 8 && v * lanes < columns; ++v) sums[v] += load(from + v * lanes);
            }
            for_columns(columns, [&](int64_t j, auto n) { store(dtable + r * hidden + column + j, sums[j / lanes], n); });
        }
    });
}

template <class T>
void backward(const EmbedLayerNormBackward& b, int threads) {
    const EmbedLayerNorm& p = b.forward;
    const T* const weight = static_cast<const T*>(p.weight);
    const int64_t stride = padded(p.hidden);
    float* const dz = scratch<float>(dz_slot, p.tokens * stride);
    void* const outputs[] = {b.dweight, b.dbias};
    column_sums<T>(p.tokens, p.hidden, threads, 2, outputs, [&](int64_t t, float* sums) {
        float* const z = scratch<float>(z_slot, stride);
        float* const multiplier = scratch<float>(multiplier_slot, stride);
        const T* const dout = static_cast<const T*>(b.dout) + t * p.hidden;
        embedding_row<T>(p, t, z);
        if (p.dropout.threshold) dropout_row(p.dropout, t, multiplier, p.hidden);
        layer_norm_backward(
            z, {p.mean[t], p.rstd[t]}, weight, sums, sums + stride, p.hidden,
            [&](int64_t j, auto n) {
                return p.dropout.threshold ? load(dout + j, n) * load(multiplier + j, n) : load(dout + j, n);
            },
            [&](int64_t j, Vec v, auto) { store(dz + t * stride + j, v); });
    });
    table_gradient(dz, p.ids, p.tokens, p.hidden, p.vocab, static_cast<T*>(b.dword), threads);
    table_gradient(dz, p.position_ids, p.tokens, p.hidden, p.positions, static_cast<T*>(b.dposition), threads);
    table_gradient(dz, p.token_type_ids, p.tokens, p.hidden, p.types, static_cast<T*>(b.dtype_table), threads);
}

}  // namespace

int64_t embed_layer_norm_fwd(const EmbedLayerNorm& p, int threads) {
    const int64_t bad = first_outside(p);
    if (bad < 0) p.dtype == DType::float32 ? forward<float>(p, threads) : forward<bfloat16>(p, threads);
    return bad;
}

void embed_layer_norm_bwd(const EmbedLayerNormBackward& b, int threads) {
    b.forward.dtype == DType::float32 ? backward<float>(b, threads) : backward<bfloat16>(b, threads);
}

}  // namespace bertfast::BERTFAST_ISA
