// A row in the registers of its team: how the ops that take statistics of rows read each of them once.
//
// A team is as many warps as a row needs when each thread holds eight elements of it: three for 768 columns. A block is
// (threads of a team, teams), and its teams take neighbouring rows. All teams of a block do the same number of steps,
// for they meet at barriers when they add up; one without a row adds zeros.
//
// Aligned rows are read and written 16 bytes at a time, as in columns.cuh, all others an element at a time, neighbours
// by neighbouring threads. A row of more columns than a block has room for is read in several pieces and several times.
#pragma once

#include "elements.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace bertfast {
namespace {

constexpr int held = 8, most_warps = 16;  // more warps would leave a thread too few registers for the backward
constexpr int widest = held * lanes * most_warps;  // row of one piece

// What of a piece of a row one thread holds. `begin` is the piece's first column.
template <class T, bool is_aligned>
struct Slice {
    static constexpr int count = per_thread<T>, vectors = held / count;
    int cols, begin = 0;

    __device__ int column(int e) const {
        return begin + static_cast<int>(is_aligned ? (e / count * blockDim.x + threadIdx.x) * count + e % count
                                                   : e * blockDim.x + threadIdx.x);
    }
    // An aligned row ends between vectors: one comparison for each of them.
    __device__ bool has(int e) const { return column(is_aligned ? e / count * count : e) < cols; }

    // As it stands in memory, zero where the row has ended: loads of several rows can be on their way at once.
    struct Vectors {
        uint4 bits[vectors];
    };
    struct Single {
        T values[held];
    };
    using Loaded = std::conditional_t<is_aligned, Vectors, Single>;

    __device__ Loaded load(const T* row) const {
        Loaded loaded;
        if constexpr (is_aligned) {
#pragma unroll
            for (int v = 0; v < vectors; ++v)
                loaded.bits[v] = has(v * count) ? *reinterpret_cast<const uint4*>(row + column(v * count))
                                                : make_uint4(0, 0, 0, 0);
        } else {
#pragma unroll
            for (int e = 0; e < held; ++e) loaded.values[e] = has(e) ? row[column(e)] : static_cast<T>(0.0f);
        }
        return loaded;
    }

    __device__ static void widen(const Loaded& loaded, float (&to)[held]) {
        if constexpr (is_aligned) {
#pragma unroll
            for (int v = 0; v < vectors; ++v) {
                float part[count];
                unpack<T>(loaded.bits[v], part);
#pragma unroll
                for (int i = 0; i < count; ++i) to[v * count + i] = part[i];
            }
        } else {
#pragma unroll
            for (int e = 0; e < held; ++e) to[e] = static_cast<float>(loaded.values[e]);
        }
    }

    __device__ void store(T* row, const float (&values)[held]) const {
        if constexpr (is_aligned) {
#pragma unroll
            for (int v = 0; v < vectors; ++v) {
                float part[count];
#pragma unroll
                for (int i = 0; i < count; ++i) part[i] = values[v * count + i];
                if (has(v * count)) store_16_bytes(row + column(v * count), pack<T>(part));
            }
        } else {
#pragma unroll
            for (int e = 0; e < held; ++e)
                if (has(e)) row[column(e)] = static_cast<T>(values[e]);
        }
    }

    // The same columns of a row of floats, whatever T is: of a workspace.
    __device__ void load_floats(const float* row, float (&to)[held]) const {
        constexpr int side_by_side = is_aligned ? 4 : 1;
#pragma unroll
        for (int e = 0; e < held; e += side_by_side) {
            if constexpr (is_aligned) {
                const float4 four =
                    has(e) ? *reinterpret_cast<const float4*>(row + column(e)) : make_float4(0, 0, 0, 0);
                to[e] = four.x, to[e + 1] = four.y, to[e + 2] = four.z, to[e + 3] = four.w;
            } else {
                to[e] = has(e) ? row[column(e)] : 0.0f;
            }
        }
    }
    __device__ void store_floats(float* row, const float (&values)[held]) const {
        constexpr int side_by_side = is_aligned ? 4 : 1;
#pragma unroll
        for (int e = 0; e < held; e += side_by_side) {
            if (!has(e)) continue;
            if constexpr (is_aligned)
                store_16_bytes(row + column(e),
                               make_uint4(__float_as_uint(values[e]), __float_as_uint(values[e + 1]),
                                          __float_as_uint(values[e + 2]), __float_as_uint(values[e + 3])));
            else
                row[column(e)] = values[e];
        }
    }
};

// Adds over the threads of each team, in an order that depends on nothing.
struct Team {
    float (&of_warps)[2][2][most_warps];  // shared; the sums take turns, and so need one barrier each
    int turn = 0;

    template <int count>
    __device__ void add(float (&values)[count]) {
#pragma unroll
        for (int distance = lanes / 2; distance > 0; distance /= 2)
#pragma unroll
            for (int k = 0; k < count; ++k) values[k] += __shfl_xor_sync(0xffffffffu, values[k], distance);
        const int of_team = blockDim.x / lanes, first = threadIdx.y * of_team;
        if (of_team == 1) return;
#pragma unroll
        for (int k = 0; k < count; ++k)
            if (threadIdx.x % lanes == 0) of_warps[turn][k][first + threadIdx.x / lanes] = values[k];
        __syncthreads();
#pragma unroll
        for (int k = 0; k < count; ++k) {
            values[k] = of_warps[turn][k][first];
            for (int warp = 1; warp < of_team; ++warp) values[k] += of_warps[turn][k][first + warp];
        }
        turn ^= 1;
    }
};

// A block of about so many warps for rows of `cols` columns.
inline dim3 block_of_teams(int64_t cols, int64_t wanted_warps) {
    const int64_t needed = divide_up(cols, held * lanes), warps = needed < most_warps ? needed : most_warps;
    return dim3(warps * lanes, warps < wanted_warps ? wanted_warps / warps : 1);
}

}  // namespace
}  // namespace bertfast
