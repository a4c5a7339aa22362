// Attention inside each sequence of an unpadded batch: O = dropout(softmax(scale Q K^T)) V, and its backward.
//
// The unit of work is one head of one sequence (for a long sequence, some of its queries): its K and V are packed
// once into this thread's scratch and stay in cache, and queries pass over them in blocks of rows. A row of scores
// of a BERT-sized sequence is a few KiB, so the softmax sees whole rows and needs no running maximum:
//
//     forward                                       backward
//       S = c Q K^T,  c = scale log2(e)               S = c Q K^T                 dP = dO V^T
//       P = 2^(S - max)                               P = 2^(S - lse log2(e))     M = dropout multipliers
//       O = (P M) V / sum(P)                          dS = P (dP M - delta)       delta = rowsum(dO O)
//       lse = max ln(2) + ln(sum(P))                  dV += (P M)^T dO,  dK += scale dS^T Q,  dQ = scale dS K
//
// The products run in registers (attention_gemm.h), everything between loading and storing is float32, and each
// thread writes only rows that are its own; only where the processor multiplies pairs of bfloat16, the forward rounds
// P M to those. A query's arithmetic depends on its own sequence alone, and the sums over queries run in one order:
// results are the same bits for any number of threads and any neighbours.
#include <math.h>
#include <stdlib.h>

#include "attention_gemm.h"
#include "dropout.h"
#include "kernels.h"
#include "parallel.h"

namespace bertfast::BERTFAST_ISA {
namespace {

enum Slot { buffer_slot, plan_slot };

constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;

// A long sequence's queries are cut into blocks that different threads may take. Each block packs K and V anew: as
// much time as about three of its queries where they come from L3, more where they come from memory. So a block
// has at least 128 queries, and a sequence at most 16 blocks.
int64_t query_blocks(int64_t length) {
    const int64_t blocks = length / 128;
    return blocks < 1 ? 1 : blocks > 16 ? 16 : blocks;
}

// The backward's block of queries. It is the depth of the products that make dK and dV, whose tiles are read and
// written once per block.
constexpr int64_t backward_rows = 48;

// Rows of scores are one vector longer than they need be: at a power of two apart, walking down a column (which
// is how the transposed products read them) would use only a few sets of the cache. What stands in the columns
// from `length` on is never read by a product.
int64_t score_stride(int64_t length) { return round_up(length, lanes) + lanes; }

struct Region {
    float** pointer;
    int64_t size;
};

// Lays the regions one behind another in this thread's scratch, each on a cache line.
template <int n>
void allocate(const Region (&regions)[n]) {
    constexpr int64_t line = 16;
    int64_t total = 0;
    for (const Region& region : regions) total += round_up(region.size, line);
    float* next = scratch<float>(buffer_slot, total);
    for (const Region& region : regions) {
        *region.pointer = next;
        next += round_up(region.size, line);
    }
}

// A sequence's work comes in `groups` of heads, each of them for `blocks` of its queries.
struct Sequence {
    int64_t index, start, length, groups, blocks, first_item;
};

struct Plan {
    const Sequence* sequences;
    int64_t count, items;
};

// Heads [head, last_head) of one sequence, and the queries [first, last) of it.
struct Item {
    int64_t sequence, start, length, head, last_head, first, last;
};

int longest_first(const void* left, const void* right) {
    const Sequence &a = *static_cast<const Sequence*>(left), &b = *static_cast<const Sequence*>(right);
    if (a.length != b.length) return a.length > b.length ? -1 : 1;
    return a.index < b.index ? -1 : 1;
}

// About what a head of a sequence costs, in multiply-adds: packing is worth those of a few queries.
int64_t head_cost(const VarlenAttention& a, int64_t length) { return length * (length + 64) * a.head_size; }

// Long sequences come first, so that what the last threads are still busy with is short. An item is large enough to be
// worth taking (some microseconds), and beyond that small enough for the threads to end together.
Plan make_plan(const VarlenAttention& a, bool split_queries, int threads) {
    constexpr int64_t least = 500000, items_per_thread = 8;
    Sequence* const sequences = scratch<Sequence>(plan_slot, a.sequences);
    Plan plan = {sequences, 0, 0};
    int64_t cost = 0;
    for (int64_t i = 0; i < a.sequences; ++i) {
        const int64_t start = a.cu_seqlens[i], length = a.cu_seqlens[i + 1] - start;
        if (length > 0) sequences[plan.count++] = {i, start, length, 0, 0, 0};
        cost += a.heads * head_cost(a, length);
    }
    const int64_t share = cost / (threads * items_per_thread), item = share < least ? least : share;
    qsort(sequences, static_cast<size_t>(plan.count), sizeof(Sequence), longest_first);
    for (Sequence* s = sequences; s < sequences + plan.count; ++s) {
        int64_t wanted = (a.heads * head_cost(a, s->length) + item - 1) / item;
        if (wanted > 1 && plan.count < threads) wanted = round_up(wanted, threads);
        const int64_t most = split_queries ? query_blocks(s->length) : 1;
        s->groups = wanted < a.heads ? wanted : a.heads;
        s->blocks = wanted / a.heads < 1 ? 1 : wanted / a.heads < most ? wanted / a.heads : most;
        s->first_item = plan.items;
        plan.items += s->groups * s->blocks;
    }
    return plan;
}

Item find_item(const VarlenAttention& a, const Plan& plan, int64_t i) {
    int64_t low = 0, high = plan.count;  // sequences[low].first_item <= i < sequences[high].first_item
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (plan.sequences[middle].first_item <= i ? low : high) = middle;
    }
    const Sequence& s = plan.sequences[low];
    const int64_t group = (i - s.first_item) / s.blocks, block = (i - s.first_item) % s.blocks;
    return {s.index, s.start, s.length, group * a.heads / s.groups, (group + 1) * a.heads / s.groups,
            block * s.length / s.blocks, (block + 1) * s.length / s.blocks};
}

// The rows of one head in a tensor of tokens.
template <class T>
struct Rows {
    T* data;
    int64_t stride;

    T* operator[](int64_t i) const { return data + i * stride; }
};

// An item's Q, K or V: `part` is 0, 1 or 2.
template <class T>
Rows<const T> input_rows(const VarlenAttention& a, const Item& item, int part) {
    const T* const head = static_cast<const T*>(a.qkv) + part * a.part_stride + item.head * a.head_stride;
    return {head + item.start * a.token_stride, a.token_stride};
}

// An item's rows in a dense tensor [tokens, parts, heads, head_size].
template <class T>
Rows<T> dense_rows(T* tensor, const VarlenAttention& a, const Item& item, int part = 0, int parts = 1) {
    const int64_t stride = parts * a.heads * a.head_size;
    return {tensor + item.start * stride + (part * a.heads + item.head) * a.head_size, stride};
}

template <class T>
Rows<T> output_rows(const VarlenAttention& a, const Item& item) {
    if (!a.out_stride) return dense_rows(static_cast<T*>(a.out), a, item);
    return {static_cast<T*>(a.out) + item.start * a.out_stride + item.head * a.head_size, a.out_stride};
}

// Rows of one head lie a token apart, most of them on a page of their own, where no hardware prefetcher follows.
// Asking for many at once, before they are packed or stored to, halves the time that they take from L3. (Inline,
// because GCC takes a function of prefetches alone for one without effects, and drops its calls.)
template <class T>
BERTFAST_INLINE void prefetch(Rows<T> rows, int64_t first, int64_t count, int64_t size) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = first; i < first + count; ++i)
        for (int64_t j = 0; j < size; j += line) __builtin_prefetch(rows[i] + j, 0, 2);
}

// dst[0, n) = factor * src[0, n)
template <class T>
void store_row(T* dst, const float* src, int64_t n, float factor) {
    for_columns(n, [&](int64_t j, auto count) { store(dst + j, load(src + j) * factor, count); });
}

template <class T>
float dot(const T* x, const float* y, int64_t n) {
    Vec sum = {};
    for_columns(n, [&](int64_t j, auto count) { sum = fma(load(x + j, count), load(y + j), sum); });
    return reduce_add(sum);
}

void draw_multipliers(const VarlenAttention& a, const Item& item, int64_t query, float* multiplier) {
    dropout_keys(a.dropout, static_cast<uint32_t>(query), static_cast<uint32_t>(item.head),
                 static_cast<uint32_t>(item.sequence), multiplier, item.length);
}

// Of a block's rows, and of as many more as fill the last vector.
constexpr int64_t statistics = (column_rows + lanes - 1) / lanes * lanes;

template <class Reduce>
void reduce_tile(Vec (&parts)[statistics], float* result, Reduce reduce) {
    for (int64_t i = 0; i < statistics; i += lanes) store(result + i, reduce_rows(parts + i, reduce));
}

// Where a tile's scores go: times a factor, and -infinity for what is no key.
struct Scores {
    float* data;
    int64_t row;
    float factor;
    const float* present;             // [keys up to the next multiple of lanes] 0 or -infinity

    BERTFAST_METHOD Vec begin(int64_t, int64_t) const { return Vec{}; }
    template <int vecs>
    BERTFAST_METHOD void end(int64_t m, int64_t n, const Vec (&sum)[vecs]) const {
#pragma GCC unroll 8
        for (int i = 0; i < vecs; ++i)
            store(data + m * row + n + i * lanes, fma(sum[i], splat(factor), load(present + n + i * lanes)));
    }
};

// scores[i, 0..n) = 2^(scores - max), times multiplier where there is dropout, in each row of a block,
// as elements of Kind that begin where the row does. n is a multiple of lanes. The sums are of what the row held before
// the multiplication and the rounding, as PyTorch's are: those of the rounded are less accurate for lse.
template <class Kind>
void exponentiate(float* scores, int64_t stride, int64_t rows, int64_t n, const float* multiplier, float* maxima,
                  float* sums) {
    Vec parts[statistics] = {};
    for (int64_t i = 0; i < rows; ++i) {
        const float* const row = scores + i * stride;
        Vec top = load(row);
        for (int64_t j = lanes; j < n; j += lanes) top = max(load(row + j), top);
        parts[i] = top;
    }
    reduce_tile(parts, maxima, [](Vec a, Vec b) { return max(a, b); });
    for (int64_t i = 0; i < rows; ++i) {
        float* const row = scores + i * stride;
        typename Kind::Element* const p = reinterpret_cast<typename Kind::Element*>(row);
        const Vec top = splat(maxima[i]);
        Vec sum = {};
        const auto take = [&](int64_t j) BERTFAST_METHOD {
            const Vec value = exp2(load(row + j) - top);
            sum += value;
            return multiplier ? value * load(multiplier + i * stride + j) : value;
        };
        int64_t j = 0;
        for (; j + 2 * lanes <= n; j += 2 * lanes) {
            const Vec first = take(j), second = take(j + lanes);
            Kind::narrow(p + j, first, second);
        }
        if (j < n) Kind::narrow(p + j, take(j));
        parts[i] = sum;
    }
    reduce_tile(parts, sums, [](Vec a, Vec b) { return a + b; });
}

// Where a tile's products with V go: each row times a factor of its own.
template <class Kind, class T>
struct Context {
    Rows<T> rows;
    const float* factor;

    BERTFAST_METHOD Vec begin(int64_t, int64_t) const { return Vec{}; }
    template <int vecs>
    BERTFAST_METHOD void end(int64_t m, int64_t n, const Vec (&sum)[vecs]) const {
        const Vec scale = splat(factor[m]);
        if constexpr (vecs == 2)
            Kind::narrow(rows[m] + n, sum[0] * scale, sum[1] * scale);
        else
            Kind::narrow(rows[m] + n, sum[0] * scale);
    }
};

// A row of `size` elements as words, with zeros up to the next multiple of `lanes`.
template <class Kind, class T>
void copy_words(const T* row, int64_t size, float* dst) {
    constexpr int64_t step = lanes * Kind::elements;
    for (int64_t j = 0; j < size; j += step, dst += lanes)
        store(dst, Kind::words(row + j, size - j < step ? size - j : step));
}

// What a head will read and write of some tokens.
template <class T>
BERTFAST_INLINE void prefetch_head(const VarlenAttention& a, Item item, int64_t head, int64_t first, int64_t count) {
    item.head = head;
    for (int part = 0; part < 3; ++part) prefetch(input_rows<T>(a, item, part), first, count, a.head_size);
    prefetch(output_rows<T>(a, item), first, count, a.head_size);
}

template <class T, class Kind>
void forward_item(const VarlenAttention& a, Item item) {
    constexpr int64_t elements = Kind::elements;
    const int64_t length = item.length, keys = round_up(length, lanes), stride = score_stride(length);
    const int64_t size = a.head_size, width = round_up(size, lanes);
    const int64_t words = (size + elements - 1) / elements, steps = (length + elements - 1) / elements;
    // Q is multiplied where it is if it consists of whole words there, and if its rows do not all fall into the same
    // sets of the first-level cache.
    const int64_t row_bytes = a.token_stride * static_cast<int64_t>(sizeof(T));
    const bool in_place = sizeof(T) * elements == 4 && size % elements == 0 && row_bytes % 4096 != 0;
    const int64_t queries = item.last - item.first;
    const int64_t block = length <= lanes ? column_rows : tile_rows, blocks = (queries + block - 1) / block;
    float *k_transposed, *v, *q, *present, *p, *o, *multiplier;
    allocate({{&k_transposed, words * round_up(length, tile_cols)},
              {&v, steps * width},
              {&q, block * width},
              {&present, keys},
              {&p, block * stride},
              {&o, block * width},
              {&multiplier, a.dropout.threshold ? block * stride : 0}});
    if (!a.dropout.threshold) multiplier = nullptr;
    for (int64_t j = 0; j < keys; ++j) present[j] = j < length ? 0 : -INFINITY;
    if (multiplier)  // what fills up a row of probabilities stays 0
        for (int64_t m = 0; m < block; ++m)
            for (int64_t j = length; j < keys; ++j) multiplier[m * stride + j] = 0;

    prefetch_head<T>(a, item, item.head, 0, length);
    for (; item.head < item.last_head; ++item.head) {
        const Rows<const T> q_rows = input_rows<T>(a, item, 0), k_rows = input_rows<T>(a, item, 1),
                            v_rows = input_rows<T>(a, item, 2);
        const MatrixB kt = pack_transposed<Kind>(k_rows[0], k_rows.stride, length, size, k_transposed);
        Kind::pack(v_rows[0], v_rows.stride, length, size, v);
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t first = item.first + i * queries / blocks;
            const int64_t rows = item.first + (i + 1) * queries / blocks - first;
            if (item.head + 1 < item.last_head) prefetch_head<T>(a, item, item.head + 1, first, rows);

            ByRows q_here = {q_rows[first], row_bytes};
            if (!in_place) {
                for (int64_t m = 0; m < rows; ++m) copy_words<Kind>(q_rows[first + m], size, q + m * width);
                q_here = by_rows(q, width);
            }
            multiply<Kind>(rows, length, words, q_here, kt, Scores{p, stride, a.scale * log2e, present});
            if (multiplier)
                for (int64_t m = 0; m < rows; ++m) draw_multipliers(a, item, first + m, multiplier + m * stride);
            float maxima[statistics], sums[statistics];
            exponentiate<Kind>(p, stride, rows, keys, multiplier, maxima, sums);
            if (a.lse) {
                float* const lse = a.lse + item.head * a.tokens + item.start + first;
                for (int64_t m = 0; m < rows; ++m) lse[m] = maxima[m] * ln2 + logf(sums[m]);
            }
            for (int64_t m = 0; m < statistics; m += lanes) store(sums + m, 1 / load(sums + m));

            const Rows<T> all = output_rows<T>(a, item), out = {all[first], all.stride};
            if (size % lanes == 0) {
                multiply<Kind>(rows, size, steps, by_rows(p, stride), row_major(v, width), Context<Kind, T>{out, sums});
            } else {
                multiply<Kind>(rows, size, steps, by_rows(p, stride), row_major(v, width), Sums{o, width});
                for (int64_t m = 0; m < rows; ++m) store_row(out[m], o + m * width, size, sums[m]);
            }
        }
    }
}

// The backward's elementwise part, for one query. On entry p holds scores and ds holds dO V^T; on exit p holds the
// probabilities after dropout and ds the gradient of the scores. lse2 is in the scores' unit, that of a power of 2.
void row_gradient(float* p, float* ds, const float* multiplier, int64_t n, float lse2, float delta) {
    for (int64_t j = 0; j < n; j += lanes) {
        const Vec probability = exp2(load(p + j) - lse2), factor = load(multiplier + j);
        store(ds + j, probability * (load(ds + j) * factor - delta));
        store(p + j, probability * factor);
    }
}

template <class T>
void backward_head(const VarlenAttentionBackward& b, const Item& item) {
    const VarlenAttention& a = b.forward;
    const int64_t length = item.length, size = a.head_size, width = round_up(size, lanes);
    const int64_t block = backward_rows, stride = score_stride(length);
    float *k_transposed, *v_transposed, *k, *q, *dout, *p, *ds, *dq, *dk, *dv, *multiplier;
    allocate({{&k_transposed, size * round_up(length, tile_cols)},
              {&v_transposed, size * round_up(length, tile_cols)},
              {&k, length * width},
              {&q, block * width},
              {&dout, block * width},
              {&p, block * stride},
              {&ds, block * stride},
              {&dq, block * width},
              {&dk, length * width},
              {&dv, length * width},
              {&multiplier, stride}});

    const Rows<const T> q_rows = input_rows<T>(a, item, 0), k_rows = input_rows<T>(a, item, 1),
                        v_rows = input_rows<T>(a, item, 2);
    const Rows<const T> o_rows = dense_rows(static_cast<const T*>(a.out), a, item),
                        dout_rows = dense_rows(static_cast<const T*>(b.dout), a, item);
    T* const dqkv = static_cast<T*>(b.dqkv);
    const Rows<T> dq_rows = dense_rows(dqkv, a, item, 0, 3), dk_rows = dense_rows(dqkv, a, item, 1, 3),
                  dv_rows = dense_rows(dqkv, a, item, 2, 3);
    const float* const lse = a.lse + item.head * a.tokens + item.start;

    prefetch(k_rows, 0, length, size);
    prefetch(v_rows, 0, length, size);
    const MatrixB kt = pack_transposed(k_rows[0], k_rows.stride, length, size, k_transposed);
    const MatrixB vt = pack_transposed(v_rows[0], v_rows.stride, length, size, v_transposed);
    Floats::pack(k_rows[0], k_rows.stride, length, size, k);
    for (int64_t j = 0; j < stride; ++j) multiplier[j] = 1;

    for (int64_t first = 0; first < length; first += block) {
        const int64_t rows = length - first < block ? length - first : block;
        prefetch(q_rows, first, rows, size);
        prefetch(dout_rows, first, rows, size);
        prefetch(o_rows, first, rows, size);
        Floats::pack(q_rows[first], q_rows.stride, rows, size, q);
        Floats::pack(dout_rows[first], dout_rows.stride, rows, size, dout);
        multiply(rows, length, size, by_rows(q, width), kt, Scaled{p, stride, a.scale * log2e});
        multiply(rows, length, size, by_rows(dout, width), vt, Sums{ds, stride});
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t query = first + i;
            if (a.dropout.threshold) draw_multipliers(a, item, query, multiplier);
            const float delta = dot(o_rows[query], dout + i * width, size);
            row_gradient(p + i * stride, ds + i * stride, multiplier, length, lse[query] * log2e, delta);
        }
        const bool accumulate = first > 0;
        multiply(length, size, rows, by_columns(p, stride), row_major(dout, width), Sums{dv, width, accumulate});
        multiply(length, size, rows, by_columns(ds, stride), row_major(q, width), Sums{dk, width, accumulate});
        prefetch(dq_rows, first, rows, size);
        multiply(rows, size, length, by_rows(ds, stride), row_major(k, width), Sums{dq, width});
        for (int64_t i = 0; i < rows; ++i) store_row(dq_rows[first + i], dq + i * width, size, a.scale);
    }
    prefetch(dk_rows, 0, length, size);
    prefetch(dv_rows, 0, length, size);
    for (int64_t j = 0; j < length; ++j) {
        store_row(dk_rows[j], dk + j * width, size, a.scale);
        store_row(dv_rows[j], dv + j * width, size, 1);
    }
}

template <class T>
void backward_item(const VarlenAttentionBackward& b, Item item) {
    for (; item.head < item.last_head; ++item.head) backward_head<T>(b, item);
}

}  // namespace

void varlen_attention_fwd(const VarlenAttention& a, int threads) {
    const Plan plan = make_plan(a, true, threads);
#if defined(__AVX512BF16__)
    const auto run = a.dtype == DType::float32 ? forward_item<float, Floats> : forward_item<bfloat16, Pairs>;
#else
    const auto run = a.dtype == DType::float32 ? forward_item<float, Floats> : forward_item<bfloat16, Floats>;
#endif
    parallel_for(plan.items, threads, [&](int64_t i) { run(a, find_item(a, plan, i)); });
}

void varlen_attention_bwd(const VarlenAttentionBackward& b, int threads) {
    const Plan plan = make_plan(b.forward, false, threads);
    const auto run = b.forward.dtype == DType::float32 ? backward_item<float> : backward_item<bfloat16>;
    parallel_for(plan.items, threads, [&](int64_t i) { run(b, find_item(b.forward, plan, i)); });
}

}  // namespace bertfast::BERTFAST_ISA
