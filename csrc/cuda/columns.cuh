// How a matrix is cut up for the ops that treat every row alike: tiles of columns by chunks of rows.
//
// A warp takes 512 bytes of a row at a time and a thread 16 of them, always of the same columns, so that what belongs
// to a column (a bias, a sum over the rows) stays in registers. The warps of a block take neighbouring rows. A block
// has one tile of columns and one chunk of rows; chunks depend on the number of rows alone, which makes sums over
// rows the same on every card.
//
// Aligned tiles are read and written 16 bytes at a time: they need addresses and rows that are multiples of 16 bytes.
// All others are read an element at a time, the lanes of a warp side by side.
#pragma once

#include "elements.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace bertfast {
namespace {

constexpr int warps = 8;

template <class T>
dim3 grid(int64_t rows, int64_t cols) {
    return dim3(divide_up(cols, lanes * per_thread<T>), row_chunks(rows));
}
inline dim3 block() { return dim3(lanes, warps); }

template <class T>
struct Elements {
    T values[per_thread<T>];
};

// The columns of one thread.
template <class T, bool is_aligned>
struct Columns {
    static constexpr int count = per_thread<T>;
    int64_t begin;  // of the tile
    int64_t cols;

    __device__ explicit Columns(int64_t cols) : begin(int64_t{blockIdx.x} * lanes * count), cols(cols) {}

    // Where column i of the thread stands in the tile, and whether the matrix has it. A thread without its column 0
    // has none, and must not load or store.
    __device__ int place(int i) const { return is_aligned ? threadIdx.x * count + i : threadIdx.x + i * lanes; }
    __device__ bool has(int i) const { return begin + place(i) < cols; }

    // What stands in the row, not yet as floats: loads of several rows can be on their way at once.
    using Loaded = std::conditional_t<is_aligned, uint4, Elements<T>>;
    __device__ Loaded load(const T* row) const {
        const T* const from = row + begin + place(0);
        if constexpr (is_aligned) {
            return *reinterpret_cast<const uint4*>(from);
        } else {
            Loaded loaded = {};
            for (int i = 0; i < count; ++i)
                if (has(i)) loaded.values[i] = from[i * lanes];
            return loaded;
        }
    }

    __device__ static void widen(const Loaded& loaded, float (&to)[count]) {
        if constexpr (is_aligned)
            unpack<T>(loaded, to);
        else
            for (int i = 0; i < count; ++i) to[i] = static_cast<float>(loaded.values[i]);
    }

    __device__ void store(T* row, const float (&values)[count]) const {
        T* const to = row + begin + place(0);
        if constexpr (is_aligned)
            store_16_bytes(to, pack<T>(values));
        else
            for (int i = 0; i < count; ++i)
                if (has(i)) to[i * lanes] = static_cast<T>(values[i]);
    }
};

// The rows of the block's chunk.
struct Rows {
    int64_t begin, end;
    __device__ Rows(int64_t rows, int64_t chunk) : begin(blockIdx.y * chunk), end(min(begin + chunk, rows)) {}
};

// Adds what each warp of the block has summed over its rows, in the order of the warps, and writes the block's part of
// a workspace of [row_chunks, cols].
template <class T, bool is_aligned>
__device__ void store_chunk(const Columns<T, is_aligned>& columns, const float (&sums)[per_thread<T>],
                            float* workspace) {
    constexpr int tile = lanes * per_thread<T>;
    static_assert(tile <= lanes * warps, "one thread for each column of the tile");
    __shared__ float by_warp[warps][tile];
    for (int i = 0; i < per_thread<T>; ++i) by_warp[threadIdx.y][columns.place(i)] = sums[i];
    __syncthreads();
    const int j = threadIdx.y * lanes + threadIdx.x;
    if (j >= tile || columns.begin + j >= columns.cols) return;
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += by_warp[warp][j];
    workspace[blockIdx.y * columns.cols + columns.begin + j] = sum;
}

// Where sums over rows go, one after another in the workspace; null where one is not wanted.
template <class T>
struct SumsTo {
    T* out[3];
};

// Each out = the sum of its chunks. 32 columns to a block; each warp adds every 32nd chunk, then one warp adds the
// warps.
template <class T>
__global__ void __launch_bounds__(1024) add_chunks_kernel(const float* workspace, SumsTo<T> to, int64_t chunks,
                                                          int64_t cols) {
    __shared__ float by_warp[lanes][lanes];
    wait_for_predecessors();
    start_dependents();
    T* const out = blockIdx.y == 0 ? to.out[0] : blockIdx.y == 1 ? to.out[1] : to.out[2];
    if (!out) return;
    workspace += blockIdx.y * chunks * cols;
    const int64_t column = int64_t{blockIdx.x} * lanes + threadIdx.x;
    float sum = 0;
    if (column < cols) {
#pragma unroll
        for (int k = 0; k < most_chunks / lanes; ++k) {
            const int64_t chunk = k * lanes + threadIdx.y;
            if (chunk < chunks) sum += workspace[chunk * cols + column];
        }
    }
    by_warp[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= cols) return;
    sum = 0;
    for (int warp = 0; warp < lanes; ++warp) sum += by_warp[warp][threadIdx.x];
    out[column] = static_cast<T>(sum);
}

// The workspace is [outs, row_chunks(rows), cols].
template <class T, class... Outs>
void add_chunks(const float* workspace, int64_t rows, int64_t cols, cudaStream_t stream, Outs... outs) {
    const dim3 grid(divide_up(cols, lanes), sizeof...(outs));
    launch(add_chunks_kernel<T>, grid, dim3(lanes, lanes), 0, stream, workspace, SumsTo<T>{static_cast<T*>(outs)...},
           row_chunks(rows), cols);
}

}  // namespace
}  // namespace bertfast
