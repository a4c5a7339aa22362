// LayerNorm and its backward, of rows that a `Source` makes: the kernels of norm.cu and embedding.cu.
//
// With y the row, xhat = (y - mean) rstd and g = dout * weight: out = xhat weight + bias, and dy = rstd (g - mean(g) -
// xhat mean(g xhat)). The variance is that of the centred row, which stays in registers; statistics are float32.
//
// A Source has
//     Kept, keep(slice)                          what serves every row of a thread, loaded once
//     Loaded, load(slice, row)                   what a row is made of, on its way from memory; rows may not exist
//     values(slice, row, kept, loaded, y)        y, returning which elements dropout keeps, bit by bit
//     finish(kept, bits, out)                    last changes to the output of the norm
// and for the backward
//     sums                                       how many sums over the rows: of dout xhat, dout, and a third or not
//     incoming(kept, bits, dout)                 the gradient of the norm's output from that of the op's
//     store(slice, row, kept, bits, dy)          writes the row's gradients; dy becomes what the third sum adds up.
#pragma once

#include "columns.cuh"
#include "row.cuh"

namespace bertfast {
namespace {

constexpr int forward_warps = 8;  // to a block; the backward's blocks are as large as they can be, for they are few

template <class T>
struct Norm {
    const T *weight, *bias;
    float *mean, *rstd;  // null in a forward that has no backward
    int64_t rows;
    int cols;
    float eps;

    // sum / cols by a reciprocal and the correction of its rounding, in a third of the instructions of a division, and
    // exact where that is: a row of equal numbers has that mean.
    __device__ float mean_of(float sum) const {
        const float inverse = 1.0f / static_cast<float>(cols), quotient = sum * inverse;
        const float corrected = fmaf(fmaf(-quotient, static_cast<float>(cols), sum), inverse, quotient);
        return isinf(quotient) ? quotient : corrected;  // whose correction would be NaN
    }
};

// Whether a row is fetched while the one before it is computed. Others have enough loads on their way, and too few
// registers.
template <class T, bool is_aligned>
constexpr bool looks_ahead = is_aligned && sizeof(T) == 2;

template <class T, bool is_aligned, class Source>
__global__ void __launch_bounds__(lanes * most_warps, looks_ahead<T, is_aligned> ? 2 : 1)
    norm_forward_kernel(const Source source, const Norm<T> norm, T* out, int steps) {
    __shared__ float scratch[2][2][most_warps];
    wait_for_predecessors();
    start_dependents();
    Team team{scratch};
    const Slice<T, is_aligned> slice{norm.cols};
    const auto weight = slice.load(norm.weight), bias = slice.load(norm.bias);
    const auto kept = source.keep(slice);
    int64_t row = int64_t{blockIdx.x} * steps * blockDim.y + threadIdx.y;
    auto next = source.load(slice, row, row < norm.rows);
    for (int step = 0; step < steps && row - threadIdx.y < norm.rows; ++step, row += blockDim.y) {
        if (!looks_ahead<T, is_aligned> && step > 0) next = source.load(slice, row, row < norm.rows);
        const auto loaded = next;
        if (looks_ahead<T, is_aligned> && step + 1 < steps)
            next = source.load(slice, row + blockDim.y, row + blockDim.y < norm.rows);
        float y[held], sum[1] = {}, squares[1] = {};
        const uint32_t bits = source.values(slice, row, kept, loaded, y);
#pragma unroll
        for (int e = 0; e < held; ++e) sum[0] += y[e];  // 0 behind the row's end
        team.add(sum);
        const float mean = norm.mean_of(sum[0]);
#pragma unroll
        for (int e = 0; e < held; ++e) {
            y[e] -= mean;
            squares[0] += slice.has(e) ? y[e] * y[e] : 0.0f;
        }
        team.add(squares);
        const float rstd = rsqrtf(norm.mean_of(squares[0]) + norm.eps);
        if (row >= norm.rows) continue;
        float gamma[held], beta[held];
        slice.widen(weight, gamma);
        slice.widen(bias, beta);
#pragma unroll
        for (int e = 0; e < held; ++e) y[e] = fmaf(y[e] * rstd, gamma[e], beta[e]);
        source.finish(kept, bits, y);
        slice.store(out + row * norm.cols, y);
        if (norm.mean && threadIdx.x == 0) {
            norm.mean[row] = mean;
            norm.rstd[row] = rstd;
        }
    }
}

// The same for rows of several pieces, one team to a block.
template <class T, class Source>
__global__ void __launch_bounds__(lanes * most_warps)
    wide_norm_forward_kernel(const Source source, const Norm<T> norm, T* out) {
    __shared__ float scratch[2][2][most_warps];
    wait_for_predecessors();
    start_dependents();
    Team team{scratch};
    const int64_t row = blockIdx.x;
    const auto pieces = [&](auto each) {
#pragma unroll 1  // several pieces at once would take too many registers
        for (int begin = 0; begin < norm.cols; begin += widest) {
            const Slice<T, false> slice{norm.cols, begin};
            const auto kept = source.keep(slice);
            float y[held];
            const uint32_t bits = source.values(slice, row, kept, source.load(slice, row, true), y);
            each(slice, kept, bits, y);
        }
    };
    float sum[1] = {}, squares[1] = {};
    pieces([&](const auto& slice, const auto&, uint32_t, const float(&y)[held]) {
        for (int e = 0; e < held; ++e) sum[0] += y[e];
    });
    team.add(sum);
    const float mean = norm.mean_of(sum[0]);
    pieces([&](const auto& slice, const auto&, uint32_t, const float(&y)[held]) {
        for (int e = 0; e < held; ++e) squares[0] += slice.has(e) ? (y[e] - mean) * (y[e] - mean) : 0.0f;
    });
    team.add(squares);
    const float rstd = rsqrtf(norm.mean_of(squares[0]) + norm.eps);
    pieces([&](const auto& slice, const auto& kept, uint32_t bits, float(&y)[held]) {
        float gamma[held], beta[held];
        slice.widen(slice.load(norm.weight), gamma);
        slice.widen(slice.load(norm.bias), beta);
        for (int e = 0; e < held; ++e) y[e] = fmaf((y[e] - mean) * rstd, gamma[e], beta[e]);
        source.finish(kept, bits, y);
        slice.store(out + row * norm.cols, y);
    });
    if (norm.mean && threadIdx.x == 0) {
        norm.mean[row] = mean;
        norm.rstd[row] = rstd;
    }
}

// A row's part in the backward, once its y and dout are there: xhat in place of y.
template <class T, bool is_aligned>
struct RowGradient {
    const Slice<T, is_aligned>& slice;
    float (&y)[held];
    float (&dout)[held];

    __device__ void normalise(float mean, float rstd) {
#pragma unroll
        for (int e = 0; e < held; ++e) y[e] = slice.has(e) ? (y[e] - mean) * rstd : 0.0f;
    }
    __device__ void add_to(float (&sums)[2], const float (&gamma)[held]) const {
#pragma unroll
        for (int e = 0; e < held; ++e) {  // dout and xhat are 0 behind the row's end
            sums[0] += dout[e] * gamma[e];
            sums[1] += dout[e] * gamma[e] * y[e];
        }
    }
    __device__ void differentiate(const Norm<T>& norm, const float (&sums)[2], const float (&gamma)[held], float rstd,
                                  float (&dy)[held]) const {
        const float mean_g = norm.mean_of(sums[0]), mean_g_xhat = norm.mean_of(sums[1]);
#pragma unroll
        for (int e = 0; e < held; ++e) dy[e] = (dout[e] * gamma[e] - mean_g - y[e] * mean_g_xhat) * rstd;
    }
};

// A block has a chunk of rows (columns.cuh), and writes its part of the workspace [sums, chunks, cols].
template <class T, bool is_aligned, class Source>
__global__ void __launch_bounds__(lanes * most_warps, 1)
    norm_backward_kernel(const Source source, const Norm<T> norm, const T* dout, float* workspace, int chunk) {
    __shared__ float scratch[2][2][most_warps], by_team[widest];
    wait_for_predecessors();
    start_dependents();
    Team team{scratch};
    const Slice<T, is_aligned> slice{norm.cols};
    const auto weight = slice.load(norm.weight);
    const auto kept = source.keep(slice);
    float totals[Source::sums][held] = {};
    const int64_t begin = int64_t{blockIdx.x} * chunk, end = min(begin + chunk, norm.rows);
    int64_t row = begin + threadIdx.y;
    typename Source::Loaded next;
    typename Slice<T, is_aligned>::Loaded next_dout;
    const auto fetch = [&](int64_t wanted) {
        next = source.load(slice, wanted, wanted < end);
        next_dout = wanted < end ? slice.load(dout + wanted * norm.cols) : typename Slice<T, is_aligned>::Loaded{};
    };
    if (looks_ahead<T, is_aligned>) fetch(row);
    for (; row - threadIdx.y < end; row += blockDim.y) {
        if (!looks_ahead<T, is_aligned>) fetch(row);
        const auto loaded = next;
        const auto loaded_dout = next_dout;
        const float mean = row < end ? norm.mean[row] : 0.0f, rstd = row < end ? norm.rstd[row] : 0.0f;
        if (looks_ahead<T, is_aligned>) fetch(row + blockDim.y);
        float y[held], g[held], gamma[held], dy[held], sums[2] = {};
        const uint32_t bits = source.values(slice, row, kept, loaded, y);
        slice.widen(loaded_dout, g);
        slice.widen(weight, gamma);
        source.incoming(kept, bits, g);
        RowGradient<T, is_aligned> gradient{slice, y, g};
        gradient.normalise(mean, rstd);
        gradient.add_to(sums, gamma);
        team.add(sums);
        if (row >= end) continue;
        gradient.differentiate(norm, sums, gamma, rstd, dy);
#pragma unroll
        for (int e = 0; e < held; ++e) {
            totals[0][e] += g[e] * y[e];
            totals[1][e] += g[e];
        }
        source.store(slice, row, kept, bits, dy);
        if constexpr (Source::sums == 3) {
#pragma unroll
            for (int e = 0; e < held; ++e) totals[2][e] += dy[e];
        }
    }
    const int width = blockDim.x * held, thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int k = 0; k < Source::sums; ++k) {
        __syncthreads();
#pragma unroll
        for (int e = 0; e < held; ++e) by_team[threadIdx.y * width + slice.column(e)] = totals[k][e];
        __syncthreads();
        for (int column = thread; column < norm.cols; column += blockDim.x * blockDim.y) {
            float total = by_team[column];
            for (int t = 1; t < static_cast<int>(blockDim.y); ++t) total += by_team[t * width + column];
            workspace[(int64_t{k} * gridDim.x + blockIdx.x) * norm.cols + column] = total;
        }
    }
}

// The same for rows of several pieces, one team to a block. Its sums do not fit into registers: the workspace is where
// they grow, every column by one thread alone.
template <class T, class Source>
__global__ void __launch_bounds__(lanes * most_warps, 1)
    wide_norm_backward_kernel(const Source source, const Norm<T> norm, const T* dout, float* workspace, int chunk) {
    __shared__ float scratch[2][2][most_warps];
    wait_for_predecessors();
    start_dependents();
    Team team{scratch};
    const int64_t begin = int64_t{blockIdx.x} * chunk, end = min(begin + chunk, norm.rows);
    for (int64_t row = begin; row < end; ++row) {
        const float mean = norm.mean[row], rstd = norm.rstd[row];
        const auto pieces = [&](auto each) {
#pragma unroll 1
            for (int first = 0; first < norm.cols; first += widest) {
                const Slice<T, false> slice{norm.cols, first};
                const auto kept = source.keep(slice);
                float y[held], g[held], gamma[held];
                const uint32_t bits = source.values(slice, row, kept, source.load(slice, row, true), y);
                slice.widen(slice.load(dout + row * norm.cols), g);
                slice.widen(slice.load(norm.weight), gamma);
                source.incoming(kept, bits, g);
                RowGradient<T, false> gradient{slice, y, g};
                gradient.normalise(mean, rstd);
                each(slice, kept, bits, gradient, gamma);
            }
        };
        float sums[2] = {};
        pieces([&](const auto&, const auto&, uint32_t, const auto& gradient, const float(&gamma)[held]) {
            gradient.add_to(sums, gamma);
        });
        team.add(sums);
        pieces([&](const auto& slice, const auto& kept, uint32_t bits, const auto& gradient,
                   const float(&gamma)[held]) {
            float dy[held];
            gradient.differentiate(norm, sums, gamma, rstd, dy);
            source.store(slice, row, kept, bits, dy);
            for (int e = 0; e < held; ++e) {
                if (!slice.has(e)) continue;
                const float terms[] = {gradient.dout[e] * gradient.y[e], gradient.dout[e], dy[e]};
                for (int k = 0; k < Source::sums; ++k) {
                    float& total = workspace[(int64_t{k} * gridDim.x + blockIdx.x) * norm.cols + slice.column(e)];
                    total = row == begin ? terms[k] : total + terms[k];
                }
            }
        });
    }
}

// Rows that one team does one after another, which saves loading the weights: only where there are many.
inline int forward_steps(int64_t rows) { return static_cast<int>(rows < 4096 ? 1 : rows < 16384 ? rows / 4096 : 4); }

template <class T, bool is_aligned, class Source>
void launch_forward(const Source& source, const Norm<T>& norm, void* out, cudaStream_t stream) {
    const dim3 block = block_of_teams(norm.cols, forward_warps);
    const int steps = forward_steps(norm.rows);
    launch(norm_forward_kernel<T, is_aligned, Source>, divide_up(norm.rows, int64_t{steps} * block.y), block, 0, stream,
           source, norm, static_cast<T*>(out), steps);
}
template <class T, class Source>
void launch_wide_forward(const Source& source, const Norm<T>& norm, void* out, cudaStream_t stream) {
    launch(wide_norm_forward_kernel<T, Source>, norm.rows, lanes * most_warps, 0, stream, source, norm,
           static_cast<T*>(out));
}
template <class T, bool is_aligned, class Source>
void launch_backward(const Source& source, const Norm<T>& norm, const void* dout, float* workspace,
                     cudaStream_t stream) {
    launch(norm_backward_kernel<T, is_aligned, Source>, row_chunks(norm.rows), block_of_teams(norm.cols, most_warps), 0,
           stream, source, norm, static_cast<const T*>(dout), workspace, static_cast<int>(chunk_length(norm.rows)));
}
template <class T, class Source>
void launch_wide_backward(const Source& source, const Norm<T>& norm, const void* dout, float* workspace,
                          cudaStream_t stream) {
    launch(wide_norm_backward_kernel<T, Source>, row_chunks(norm.rows), lanes * most_warps, 0, stream, source, norm,
           static_cast<const T*>(dout), workspace, static_cast<int>(chunk_length(norm.rows)));
}

}  // namespace
}  // namespace bertfast
