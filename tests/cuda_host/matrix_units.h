// What the matrix units and the asynchronous copies do, on the emulated GPU: by the tables of the PTX ISA, section 9.7.
#pragma once

#include <cstdint>

namespace cuda_host {

// cp.async: what is copied is read and written only when the thread waits for it.
void begin_copy(void* to, const void* from, bool wanted);
void end_copy_group();
void wait_for_copies(int groups_left);

// ldmatrix.x4.trans and mma.m16n8k16.
void load_transposed(const void* row, uint32_t* words);
void multiply_16x8x16(bool half_precision, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);

// wgmma.m64nNk16, N = 8 tiles: it multiplies when the warpgroup waits, with what then stands in shared memory. Until
// then the accumulators are NaN, and a left operand in registers must stay as it was.
struct Product {
    bool half_precision, accumulate;
    bool b_is_transposed;                                      // 16 rows of N neighbours, not N rows of 16
    int tiles;
    float* d;                                                  // [tiles][4]
    const uint32_t* a_registers;                               // null where `a` describes the operand
    uint64_t a, b;
};
void multiply_64x16(const Product&);
void begin_products();       // wgmma.fence
void wait_for_products();    // wgmma.commit_group, wgmma.wait_group 0
void publish_to_products();  // fence.proxy.async: what the thread has copied to shared memory before

}  // namespace cuda_host
