// varlen_attention for short sequences: out = dropout(softmax(scale q k^T)) v, of at most 128 tokens each.
//
// What a head of a sequence needs is small: K and V of 128 tokens are 32 KiB. So one block has them whole, a warp sees
// all scores of its queries at once, and there is no running maximum and no second pass. Such a head is read once and
// written once, and memory sets the pace: what counts is that some blocks load while others compute. It takes three or
// four of them on a multiprocessor, which is what registers are saved for here.
//
// A block has four warps, and a warp two tiles of 16 queries, one after the other. Short sequences do not pay for long
// ones, though all are in one launch: a block looks at its sequence and takes as many heads as fill its warps,
//     length      1..16    17..32   33..64   65..96   97..128
//     heads         4        4        2        1        1        of a block
//     keys         16       32       64       96      128        of the code that runs: at most 31 too many
// and blocks that find no heads left end at once. The grid is made for the longest sequence: `groups` blocks for its
// heads, each of them twice where the batch is too small to fill the GPU; such `parts` share the queries of a head.
#include <cfloat>
#include <cmath>
#include <stdexcept>

#include "attention_mma.cuh"
#include "attention_wgmma.cuh"
#include "launch.cuh"

namespace bertfast {
namespace {

// A sequence that is longer than was promised gets NaN: its heads may not all have a block, nor its keys a place.
template <class T>
__device__ void answer_nan(const AttentionArguments<T>& a, int start, int length, int head_size) {
    const int64_t row = int64_t{a.heads} * head_size;
    for (int64_t i = threadIdx.x; i < length * row; i += 32 * warps) a.out[start * row + i] = static_cast<T>(NAN);
}

template <class T, int head_size, bool dropout, bool warpgroups>
__device__ void attention(const AttentionArguments<T>& a, T* shared) {
    wait_for_predecessors();
    start_dependents();
    const unsigned block = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
    const int turn = block / a.groups, group = block % a.groups;
    const int index = a.order ? a.order[turn] : turn;
    const int start = a.cu_seqlens[index], length = a.cu_seqlens[index + 1] - start;
    if (length > a.max_length) return answer_nan(a, start, length, head_size);
    const int heads = heads_of_a_block(length), head = group * heads + threadIdx.x / 32 / (warps / heads);
    if (length <= 0 || group * heads >= a.heads || 16 * (warps / heads) * static_cast<int>(part) >= length) return;
    const Sequence sequence = {index, start, head < a.heads ? length : 0, head};
    if (length <= 16)
        attend<T, head_size, 16, dropout>(a, sequence, part, shared);
    else if (length <= 32)
        attend<T, head_size, 32, dropout>(a, sequence, part, shared);
    else if (length <= 64)
        attend<T, head_size, 64, dropout>(a, sequence, part, shared);
    else if constexpr (warpgroups)
        length <= 96 ? attend_as_warpgroup<T, head_size, 96, dropout>(a, sequence, part, shared)
                     : attend_as_warpgroup<T, head_size, 128, dropout>(a, sequence, part, shared);
    else
        length <= 96 ? attend<T, head_size, 96, dropout>(a, sequence, part, shared)
                     : attend<T, head_size, 128, dropout>(a, sequence, part, shared);
}

template <class T, int head_size, bool dropout>
__global__ void __launch_bounds__(32 * warps, 3) attention_kernel(const __grid_constant__ AttentionArguments<T> a) {
    attention<T, head_size, dropout, false>(a, dynamic_shared<T>());
}

// Of sm_90a alone.
template <class T, int head_size, bool dropout>
__global__ void __launch_bounds__(32 * warps, 4)
    attention_kernel_wgmma(const __grid_constant__ AttentionArguments<T> a) {
    if constexpr (has_wgmma)
        attention<T, head_size, dropout, true>(a, dynamic_shared<T>());
    else
        trap();
}

// Fewer blocks than this leave multiprocessors without work, and warps with two tiles where one would do.
constexpr int64_t few_blocks = 128;

template <class T, int head_size, bool dropout>
void forward(const VarlenAttention& p, cudaStream_t stream) {
    const auto max_length = static_cast<int>(p.max_length);
    const int64_t groups = divide_up(p.heads, heads_of_a_block(max_length));
    const int parts = p.sequences * groups < few_blocks && max_length > 16 ? 2 : 1;
    AttentionArguments<T> a = {};
    a.qkv = static_cast<const T*>(p.qkv);
    a.token_stride = p.token_stride, a.part_stride = p.part_stride, a.head_stride = p.head_stride;
    a.cu_seqlens = p.cu_seqlens, a.order = p.order;
    a.out = static_cast<T*>(p.out), a.lse = p.lse;
    a.tokens = p.tokens;
    a.heads = static_cast<int>(p.heads), a.max_length = max_length;
    a.groups = static_cast<unsigned>(groups), a.parts = parts;
    a.scale_log2 = std::fmax(std::fabs(p.scale) * 1.44269504f, FLT_MIN);  // minus infinity times 0 would be NaN
    a.signs = p.scale < 0 ? 0x80008000u : 0;
    a.multiplier = 65536.0f / (65536.0f - p.dropout.threshold);
    a.threshold = p.dropout.threshold / 256 * 0x01010101u, a.seed = p.dropout.seed;
    // K and V of as many heads as a block has, which is 128 rows at most, and Q where wgmma comes to be used.
    const bool warpgroups = p.warpgroups && a.signs == 0;
    const size_t shared_bytes = (warpgroups && max_length > 64 ? 3 : 2) * longest_sequence * head_size * sizeof(T);
    const auto kernel =
        warpgroups ? attention_kernel_wgmma<T, head_size, dropout> : attention_kernel<T, head_size, dropout>;
    launch(kernel, p.sequences * groups * parts, 32 * warps, shared_bytes, stream, a);
    check_launch("varlen_attention_fwd", p.dtype, {p.tokens, 3, p.heads, p.head_size});
}

template <class T, int head_size>
void forward_of_size(const VarlenAttention& p, cudaStream_t stream) {
    p.dropout.threshold ? forward<T, head_size, true>(p, stream) : forward<T, head_size, false>(p, stream);
}

template <class T>
void forward_in(const VarlenAttention& p, cudaStream_t stream) {
    p.head_size == 64 ? forward_of_size<T, 64>(p, stream) : forward_of_size<T, 32>(p, stream);
}

}  // namespace

void varlen_attention_fwd(const VarlenAttention& p, Stream stream) {
    const bool aligned = (reinterpret_cast<uintptr_t>(p.qkv) | 2 * p.token_stride | 2 * p.part_stride |
                          2 * p.head_stride) % 16 == 0;
    if (!aligned) throw std::invalid_argument("qkv's address and strides must be multiples of 16 bytes");
    if (p.dtype == DType::float32 || (p.head_size != 32 && p.head_size != 64) || p.max_length > longest_sequence)
        throw std::invalid_argument("attention here is for half precision, head sizes 32 and 64, and 128 tokens");
    if (p.tokens == 0 || p.heads == 0 || p.sequences == 0) return;
    const auto forward = p.dtype == DType::bfloat16 ? forward_in<__nv_bfloat16> : forward_in<__half>;
    forward(p, static_cast<cudaStream_t>(stream));
}

}  // namespace bertfast
