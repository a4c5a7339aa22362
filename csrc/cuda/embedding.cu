// embed_layer_norm: out = dropout(LayerNorm(word[ids] + position[position_ids] + type[token_type_ids])), and its
// gradients.
//
// The backward first makes the gradient of every token's sum, as float32 rows. Then each row of a table gets the sum
// over its tokens, which stand together where the ids are sorted: the sorted tokens are cut into chunks, which any
// number of blocks can add up, and what a run of equal ids has in several chunks is added afterwards, in their order.
#include "dropout.cuh"
#include "layer_norm.cuh"

namespace bertfast {
namespace {

template <class T, bool is_aligned, bool drops>
struct Embedded {
    static constexpr int sums = 2;
    using Piece = Slice<T, is_aligned>;
    const int64_t *ids, *position_ids, *token_type_ids;
    const T *word, *position, *type;
    int64_t vocabulary, positions, types;
    const int64_t* seed;
    uint32_t threshold;
    float* dx;

    struct Kept {
        Drawn dropout;
    };
    __device__ Kept keep(const Piece&) const {
        Kept kept = {};
        if (drops) kept.dropout = {*seed, threshold};
        return kept;
    }

    struct Loaded {
        typename Piece::Loaded word, position, type;
        bool outside;
    };
    __device__ Loaded load(const Piece& slice, int64_t row, bool exists) const {
        if (!exists) return {};
        const int64_t id = ids[row], place = position_ids[row], kind = token_type_ids ? token_type_ids[row] : 0;
        // Unsigned, what is negative is large.
        if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(vocabulary) ||
            static_cast<uint64_t>(place) >= static_cast<uint64_t>(positions) ||
            static_cast<uint64_t>(kind) >= static_cast<uint64_t>(types))
            return {{}, {}, {}, true};
        return {slice.load(word + id * slice.cols), slice.load(position + place * slice.cols),
                slice.load(type + kind * slice.cols), false};
    }

    __device__ uint32_t values(const Piece& slice, int64_t row, const Kept& kept, const Loaded& loaded,
                               float (&y)[held]) const {
        uint32_t bits = 0;
        if constexpr (drops) bits = kept.dropout.kept(slice, row);  // first: it needs registers that the sums fill
        float p[held], t[held];
        slice.widen(loaded.word, y);
        slice.widen(loaded.position, p);
        slice.widen(loaded.type, t);
#pragma unroll
        for (int e = 0; e < held; ++e) y[e] = loaded.outside ? __int_as_float(0x7fffffff) : y[e] + t[e] + p[e];
        return bits;
    }

    __device__ void finish(const Kept& kept, uint32_t bits, float (&out)[held]) const {
        if constexpr (drops) kept.dropout.apply(bits, out);
    }
    __device__ void incoming(const Kept& kept, uint32_t bits, float (&dout)[held]) const { finish(kept, bits, dout); }
    __device__ void store(const Piece& slice, int64_t row, const Kept&, uint32_t, const float (&dy)[held]) const {
        slice.store_floats(dx + row * slice.cols, dy);
    }
};

template <class T>
struct Table {
    T* gradient;
    int64_t rows;
};

// The three tables are the blocks' z, pieces of wide rows their y, chunks of sorted tokens their x.
template <class T>
struct Runs {
    Table<T> word, position, type;
    const int64_t *sorted, *order;  // [3, tokens]
    const float* dx;                // [tokens, cols]
    // [3, chunks, cols] each: the sums of runs of which a chunk has the end or the middle and not the beginning; and
    // of those of which it has the beginning and not the end.
    float *ends, *beginnings;
    int64_t tokens, chunk;
    int cols;

    __device__ Table<T> table() const { return blockIdx.z == 0 ? word : blockIdx.z == 1 ? position : type; }
    __device__ const int64_t* ids() const { return sorted + blockIdx.z * tokens; }
    __device__ int64_t workspace_row(int64_t of_chunk) const {
        return (blockIdx.z * int64_t{gridDim.x} + of_chunk) * cols;
    }
};

template <class T, bool is_aligned>
__device__ void store_row(const Table<T>& table, const Slice<T, is_aligned>& slice, int64_t id,
                          const float (&total)[held]) {
    if (id >= 0 && id < table.rows) slice.store(table.gradient + id * slice.cols, total);
}

template <class T, bool is_aligned>
__global__ void __launch_bounds__(lanes * most_warps) add_runs_kernel(const Runs<T> runs) {
    constexpr int ahead = 4;  // tokens whose loads are on their way at once
    wait_for_predecessors();
    start_dependents();
    const Slice<T, is_aligned> slice{runs.cols, static_cast<int>(blockIdx.y) * widest};
    const int64_t* const ids = runs.ids();
    const int64_t* const order = runs.order + blockIdx.z * runs.tokens;
    const int64_t begin = blockIdx.x * runs.chunk, end = min(begin + runs.chunk, runs.tokens);
    const Table<T> table = runs.table();
    float total[held] = {};
    bool has_beginning = begin == 0 || ids[begin - 1] != ids[begin];
    for (int64_t first = begin; first < end; first += ahead) {
        float rows[ahead][held];
#pragma unroll
        for (int k = 0; k < ahead; ++k)
            if (first + k < end) slice.load_floats(runs.dx + order[first + k] * runs.cols, rows[k]);
#pragma unroll
        for (int k = 0; k < ahead; ++k) {
            const int64_t token = first + k;
            if (token >= end) break;
#pragma unroll
            for (int e = 0; e < held; ++e) total[e] += rows[k][e];
            const bool goes_on = token + 1 < runs.tokens && ids[token + 1] == ids[token];
            if (goes_on && token + 1 < end) continue;
            if (!has_beginning)
                slice.store_floats(runs.ends + runs.workspace_row(blockIdx.x), total);
            else if (goes_on)
                slice.store_floats(runs.beginnings + runs.workspace_row(blockIdx.x), total);
            else
                store_row(table, slice, ids[token], total);
            has_beginning = true;
#pragma unroll
            for (int e = 0; e < held; ++e) total[e] = 0;
        }
    }
}

// The block of the chunk in which a run begins that others go on with.
template <class T, bool is_aligned>
__global__ void __launch_bounds__(lanes * most_warps) join_runs_kernel(const Runs<T> runs) {
    constexpr int ahead = 4;
    wait_for_predecessors();
    start_dependents();
    const Slice<T, is_aligned> slice{runs.cols, static_cast<int>(blockIdx.y) * widest};
    const int64_t* const ids = runs.ids();
    const int64_t begin = blockIdx.x * runs.chunk, end = begin + runs.chunk;
    if (end >= runs.tokens || ids[end] != ids[end - 1]) return;
    const int64_t id = ids[end];
    if (begin > 0 && ids[begin - 1] == id) return;
    int64_t past = blockIdx.x + 2;  // the first chunk after the run, by bisection
    for (int64_t most = gridDim.x; past < most;) {
        const int64_t middle = (past + most) / 2;
        if (ids[middle * runs.chunk] == id)
            past = middle + 1;
        else
            most = middle;
    }
    float total[held];
    slice.load_floats(runs.beginnings + runs.workspace_row(blockIdx.x), total);
    for (int64_t first = blockIdx.x + 1; first < past; first += ahead) {
        float rows[ahead][held];
#pragma unroll
        for (int k = 0; k < ahead; ++k)
            if (first + k < past) slice.load_floats(runs.ends + runs.workspace_row(first + k), rows[k]);
#pragma unroll
        for (int k = 0; k < ahead; ++k)
#pragma unroll
            for (int e = 0; e < held; ++e) total[e] += first + k < past ? rows[k][e] : 0.0f;
    }
    store_row(runs.table(), slice, id, total);
}

template <class T, bool is_aligned, bool drops>
Embedded<T, is_aligned, drops> rows_of(const EmbedLayerNorm& p, float* dx = nullptr) {
    return {p.ids,
            p.position_ids,
            p.token_type_ids,
            static_cast<const T*>(p.word),
            static_cast<const T*>(p.position),
            static_cast<const T*>(p.type),
            p.vocabulary,
            p.positions,
            p.types,
            p.dropout.seed,
            p.dropout.threshold,
            dx};
}

template <class T>
Norm<T> norm_of(const EmbedLayerNorm& p) {
    return {static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), p.mean, p.rstd, p.tokens,
            static_cast<int>(p.hidden), p.eps};
}

template <class T, bool drops>
void forward(const EmbedLayerNorm& p, cudaStream_t stream) {
    if (p.hidden > widest)
        launch_wide_forward(rows_of<T, false, drops>(p), norm_of<T>(p), p.out, stream);
    else if (aligned<T>(p.hidden, p.word, p.position, p.type, p.weight, p.bias, p.out))
        launch_forward<T, true>(rows_of<T, true, drops>(p), norm_of<T>(p), p.out, stream);
    else
        launch_forward<T, false>(rows_of<T, false, drops>(p), norm_of<T>(p), p.out, stream);
}

template <class T, bool drops>
void backward(const EmbedLayerNormBackward& b, cudaStream_t stream) {
    const EmbedLayerNorm& p = b.forward;
    if (p.hidden > widest)
        launch_wide_backward(rows_of<T, false, drops>(p, b.dx), norm_of<T>(p), b.dout, b.workspace, stream);
    else if (aligned<T>(p.hidden, p.word, p.position, p.type, p.weight, b.dout, b.dx))
        launch_backward<T, true>(rows_of<T, true, drops>(p, b.dx), norm_of<T>(p), b.dout, b.workspace, stream);
    else
        launch_backward<T, false>(rows_of<T, false, drops>(p, b.dx), norm_of<T>(p), b.dout, b.workspace, stream);
}

template <class T>
void add_to_tables(const EmbedLayerNormBackward& b, cudaStream_t stream) {
    const EmbedLayerNorm& p = b.forward;
    const int64_t chunks = row_chunks(p.tokens), floats = chunks * p.hidden;
    float* const ends = b.workspace + 2 * floats;  // behind the sums of dweight and dbias
    const Runs<T> runs = {{static_cast<T*>(b.dword), p.vocabulary},
                          {static_cast<T*>(b.dposition), p.positions},
                          {static_cast<T*>(b.dtype_table), p.types},
                          b.sorted,
                          b.order,
                          b.dx,
                          ends,
                          ends + 3 * floats,
                          p.tokens,
                          chunk_length(p.tokens),
                          static_cast<int>(p.hidden)};
    const bool is_aligned = aligned<T>(p.hidden, b.dword, b.dposition, b.dtype_table, b.dx, b.workspace);
    const dim3 grid(chunks, divide_up(p.hidden, widest), 3), block(block_of_teams(p.hidden, 1).x);
    launch(is_aligned ? add_runs_kernel<T, true> : add_runs_kernel<T, false>, grid, block, 0, stream, runs);
    launch(is_aligned ? join_runs_kernel<T, true> : join_runs_kernel<T, false>, grid, block, 0, stream, runs);
}

template <class T>
void forward_in(const EmbedLayerNorm& p, cudaStream_t stream) {
    if (p.tokens == 0 || p.hidden == 0) return;
    p.dropout.seed ? forward<T, true>(p, stream) : forward<T, false>(p, stream);
    check_launch("embed_layer_norm_fwd", p.dtype, {p.tokens, p.hidden});
}

template <class T>
void backward_in(const EmbedLayerNormBackward& b, cudaStream_t stream) {
    const EmbedLayerNorm& p = b.forward;
    if (p.hidden == 0) return;
    if (p.tokens != 0) {
        p.dropout.seed ? backward<T, true>(b, stream) : backward<T, false>(b, stream);
        check_launch("embed_layer_norm_bwd", p.dtype, {p.tokens, p.hidden});
        add_to_tables<T>(b, stream);
        check_launch("embed_layer_norm_bwd", p.dtype, {p.tokens, p.hidden});
    }
    add_chunks<T>(b.workspace, p.tokens, p.hidden, stream, b.dweight, b.dbias);
    check_launch("embed_layer_norm_bwd", p.dtype, {p.tokens, p.hidden});
}

}  // namespace

void embed_layer_norm_fwd(const EmbedLayerNorm& p, Stream stream) {
    const auto forward = p.dtype == DType::float32    ? forward_in<float>
                         : p.dtype == DType::bfloat16 ? forward_in<__nv_bfloat16>
                                                      : forward_in<__half>;
    forward(p, static_cast<cudaStream_t>(stream));
}

void embed_layer_norm_bwd(const EmbedLayerNormBackward& b, Stream stream) {
    const auto backward = b.forward.dtype == DType::float32    ? backward_in<float>
                          : b.forward.dtype == DType::bfloat16 ? backward_in<__nv_bfloat16>
                                                               : backward_in<__half>;
    backward(b, static_cast<cudaStream_t>(stream));
}

}  // namespace bertfast
