// The tensor cores of sm_80 and later, as a warp uses them, and copies to shared memory that do not pass through
// registers. Like ptx.cuh, which has the rest of the inline assembly, this has a twin for the host.
#pragma once

#ifndef __CUDACC__
#include <ptx_mma_host.h>  // tests/cuda_host
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace bertfast {
namespace {

// The value, as one that the compiler does not know. What follows from it is computed anew in each turn of a loop,
// where it would otherwise be kept in registers that the loop has better uses for.
template <class T>
__device__ T recompute(T value) {
    if constexpr (sizeof(T) == 8)
        asm volatile("" : "+l"(value));
    else
        asm volatile("" : "+r"(value));
    return value;
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Begins to copy 16 bytes, or to write zeros where they are not wanted: then nothing is read. The thread has what it
// has copied after wait_for_copies, and the others have it after a barrier behind that.
__device__ inline void copy_16_bytes(void* to, const void* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(wanted ? 16 : 0)
                 : "memory");
}
// The copies begun since the last call are one group.
__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until no more than the latest `left` groups of this thread are on their way.
template <int left>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Four 8 x 8 matrices of 16 bits, transposed: lane l gives the address of row l % 8 of matrix l / 8, which is 16 bytes,
// and gets of each matrix column l / 4, rows 2 (l % 4) in the lower and 2 (l % 4) + 1 in the upper half of a word.
__device__ inline uint4 load_transposed(const void* row) {
    uint4 words;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(shared_address(row)));
    return words;
}

// d += a b, a of 16 x 16, b of 16 x 8 elements T. With g = lane / 4 and c = lane % 4 a thread holds
//     of a: row g     columns 2 c, 2 c + 1 in a[0] and 2 c + 8, 2 c + 9 in a[2]; row g + 8 likewise in a[1] and a[3];
//     of b: column g  rows 2 c, 2 c + 1 in b0 and 2 c + 8, 2 c + 9 in b1;
//     of d: row g     columns 2 c, 2 c + 1 in d[0], d[1]; row g + 8 likewise in d[2], d[3].
template <class T>
__device__ void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace
}  // namespace bertfast

#endif
