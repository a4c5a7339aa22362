// The tensor cores of sm_90a, as a warpgroup uses them: four warps, and operands that the hardware fetches from shared
// memory by itself. Machine code of sm_90a alone has these instructions: see has_wgmma. Like ptx.cuh, this has a twin.
//
// A product is asynchronous. Its accumulators, and operands in registers, must be left alone from its beginning to
// wait_for_products(); and what threads have written to shared memory is there for it after publish_to_products() in
// the writing threads and a barrier behind that.
#pragma once

#ifndef __CUDACC__
#include <ptx_wgmma_host.h>  // tests/cuda_host
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "ptx_mma.cuh"

namespace bertfast {
namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool has_wgmma = true;
#else
constexpr bool has_wgmma = false;
#endif

__device__ inline void trap() { asm volatile("trap;"); }

__device__ inline void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before the first product after registers that it reads or adds to have been written.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Waits for all products begun. The accumulators are named so that nobody reads them earlier.
template <int tiles>
__device__ void wait_for_products(float (&d)[tiles][4]) {
    asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int j = 0; j < tiles; ++j)
        asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

// The accumulators d[0] .. d[tiles - 1] as operands of an instruction, and their names in it.
#define BERTFAST_TILE(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define BERTFAST_TILES_FROM(j) BERTFAST_TILE(j), BERTFAST_TILE(j + 1), BERTFAST_TILE(j + 2), BERTFAST_TILE(j + 3)
#define BERTFAST_4_TILES BERTFAST_TILES_FROM(0)
#define BERTFAST_8_TILES BERTFAST_4_TILES, BERTFAST_TILES_FROM(4)
#define BERTFAST_12_TILES BERTFAST_8_TILES, BERTFAST_TILES_FROM(8)
#define BERTFAST_16_TILES BERTFAST_12_TILES, BERTFAST_TILES_FROM(12)
#define BERTFAST_4_NAMES "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define BERTFAST_8_NAMES \
    BERTFAST_4_NAMES ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BERTFAST_12_NAMES \
    BERTFAST_8_NAMES ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define BERTFAST_16_NAMES \
    BERTFAST_12_NAMES ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BERTFAST_WGMMA(size_and_types, names, more_names, accumulates) \
    "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " accumulates ", 0;\n\t" \
    "wgmma.mma_async.sync.aligned." size_and_types " {" names "}, " more_names ";\n\t}"

// d = a b^T, or d += a b^T, a of 64 x 16 and b of 8 tiles x 16 elements T, both with the 16 neighbours in their rows.
// A warp has 16 rows of d, and a thread of it what multiply_16x8x16 would give it of each tile.
template <class T, int tiles>
__device__ void multiply_64x16(float (&d)[tiles][4], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(tiles == 12 || tiles == 16);
#define BERTFAST_PRODUCT(size_and_types, names, operands, a_name, b_name, p_name)                               \
    asm volatile(BERTFAST_WGMMA(size_and_types, names, a_name ", " b_name ", p, 1, 1, 0, 0", p_name)             \
                 : operands                                                                                     \
                 : "l"(a), "l"(b), "r"(int{accumulate}))
    if constexpr (tiles == 12 && std::is_same_v<T, __half>)
        BERTFAST_PRODUCT("m64n96k16.f32.f16.f16", BERTFAST_12_NAMES, BERTFAST_12_TILES, "%48", "%49", "%50");
    else if constexpr (tiles == 12)
        BERTFAST_PRODUCT("m64n96k16.f32.bf16.bf16", BERTFAST_12_NAMES, BERTFAST_12_TILES, "%48", "%49", "%50");
    else if constexpr (std::is_same_v<T, __half>)
        BERTFAST_PRODUCT("m64n128k16.f32.f16.f16", BERTFAST_16_NAMES, BERTFAST_16_TILES, "%64", "%65", "%66");
    else
        BERTFAST_PRODUCT("m64n128k16.f32.bf16.bf16", BERTFAST_16_NAMES, BERTFAST_16_TILES, "%64", "%65", "%66");
#undef BERTFAST_PRODUCT
}

// d = a b, or d += a b, a as multiply_16x8x16 takes it from each warp, b of 16 rows of 8 tiles elements T.
template <class T, int tiles>
__device__ void multiply_64x16(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(tiles == 4 || tiles == 8);
#define BERTFAST_PRODUCT(size_and_types, names, operands, a_names, b_name, p_name)                              \
    asm volatile(BERTFAST_WGMMA(size_and_types, names, "{" a_names "}, " b_name ", p, 1, 1, 1", p_name)          \
                 : operands                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}))
#define BERTFAST_4_PRODUCT(types) \
    BERTFAST_PRODUCT("m64n32k16." types, BERTFAST_4_NAMES, BERTFAST_4_TILES, "%16, %17, %18, %19", "%20", "%21")
#define BERTFAST_8_PRODUCT(types) \
    BERTFAST_PRODUCT("m64n64k16." types, BERTFAST_8_NAMES, BERTFAST_8_TILES, "%32, %33, %34, %35", "%36", "%37")
    if constexpr (tiles == 4 && std::is_same_v<T, __half>)
        BERTFAST_4_PRODUCT("f32.f16.f16");
    else if constexpr (tiles == 4)
        BERTFAST_4_PRODUCT("f32.bf16.bf16");
    else if constexpr (std::is_same_v<T, __half>)
        BERTFAST_8_PRODUCT("f32.f16.f16");
    else
        BERTFAST_8_PRODUCT("f32.bf16.bf16");
#undef BERTFAST_8_PRODUCT
#undef BERTFAST_4_PRODUCT
#undef BERTFAST_PRODUCT
}

#undef BERTFAST_WGMMA

}  // namespace
}  // namespace bertfast

#endif

namespace bertfast {
namespace {

// The descriptor of rows of 128 bytes (64 elements) or 64 bytes one behind the other in shared memory, from a multiple
// of eight rows on, with their 16-byte chunks swizzled as these modes do: chunk ^ row % 8, or chunk ^ row / 2 % 4.
// Eight rows are the unit that the hardware steps by; the other step is never taken, as no operand is wider than a row.
template <int row_elements>
__device__ uint64_t describe(const void* rows) {
    constexpr uint64_t swizzle = row_elements == 64 ? 1 : 2, eight_rows = 8 * row_elements * 2;
    return swizzle << 62 | (eight_rows >> 4) << 32 | uint64_t{1} << 16 | (shared_address(rows) & 0x3ffff) >> 4;
}
// A descriptor, `bytes` further on.
__device__ inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

}  // namespace
}  // namespace bertfast
