// Kernels that do what a kernel must not, one thing each, and a few that show what the emulation promises.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/ptx.cuh"

namespace {

using namespace bertfast;

__device__ int reversed_by_shared_memory(int value, bool with_barrier) {
    __shared__ int values[64];
    values[threadIdx.x] = value;
    if (with_barrier) __syncthreads();
    return values[63 - threadIdx.x];
}

enum Probe : int {
    reverse, no_barrier, barrier_for_some, shuffle_for_some, different_calls, behind_the_tensor, misaligned_vector,
    before_the_wait, outside_an_array, behind_shared_memory, uninitialised_shared_memory, warp_barrier_across_warps,
    left_before_the_barrier,
};

__global__ void probe_kernel(Probe probe, int* out, int n) {
    const int t = threadIdx.x;
    if (probe == before_the_wait) out[t] = t;
    wait_for_predecessors();
    int result = t;
    if (probe == reverse) result = reversed_by_shared_memory(t, true);
    if (probe == no_barrier) result = reversed_by_shared_memory(t, false);
    if (probe == barrier_for_some && t < 40) __syncthreads();
    if (probe == barrier_for_some && t >= 40) __shfl_xor_sync(0xffffffffu, t, 1);
    if (probe == shuffle_for_some && t % 2) result = __shfl_xor_sync(0xffffffffu, t, 1);
    if (probe == different_calls) t % 2 ? __syncwarp() : void(__ballot_sync(0xffffffffu, 1));
    if (probe == behind_the_tensor) out[n + t] = t;
    if (probe == misaligned_vector) *reinterpret_cast<int4*>(out + 1) = make_int4(1, 2, 3, 4);
    if (probe == outside_an_array) {
        int few[4] = {0, 1, 2, 3};
        result = few[t];
    }
    if (probe == behind_shared_memory) dynamic_shared<int>()[t] = t;
    if (probe == uninitialised_shared_memory) {
        __shared__ float few[64];
        if (t < 32) few[t] = 0;
        __syncthreads();
        result = few[t] != few[t];
    }
    if (probe == warp_barrier_across_warps) {
        int* const values = dynamic_shared<int>();
        values[t] = t;
        __syncwarp();
        result = values[63 - t];
    }
    if (probe == left_before_the_barrier && t < 32) return;
    if (probe == left_before_the_barrier) __syncthreads();
    out[t] = result;
}

__global__ void convert_kernel(const float* from, __half* to_half, __nv_bfloat16* to_bfloat16, float* and_back, int n) {
    wait_for_predecessors();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    to_half[i] = static_cast<__half>(from[i]);
    to_bfloat16[i] = static_cast<__nv_bfloat16>(from[i]);
    and_back[i] = static_cast<float>(to_half[i]);
}

}  // namespace

extern "C" {
// The words of what went wrong, or "no error".
const char* cuda_host_probe(int probe, int* out, int n, int threads, int shared_bytes) {
    launch(probe_kernel, 1, threads, shared_bytes, nullptr, static_cast<Probe>(probe), out, n);
    return cudaGetErrorString(cudaGetLastError());
}
const char* cuda_host_convert(const void* from, void* to_half, void* to_bfloat16, void* and_back, int n) {
    launch(convert_kernel, (n + 255) / 256, 256, 0, nullptr, static_cast<const float*>(from),
           static_cast<__half*>(to_half), static_cast<__nv_bfloat16*>(to_bfloat16), static_cast<float*>(and_back), n);
    return cudaGetErrorString(cudaGetLastError());
}
}
