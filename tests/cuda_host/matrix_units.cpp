#include "matrix_units.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "emulator.h"
#include "include/cuda_bf16.h"
#include "include/cuda_fp16.h"

namespace cuda_host {
namespace {

struct Copy {
    void* to;
    const void* from;
    bool wanted;
    int group;
};

struct Begun {
    Product product;
    uint32_t a[4];
    std::vector<float> sums;  // [tiles][4], as they will be
};

// What a thread of the block has begun and not yet waited for.
struct Thread {
    uint64_t block = 0;
    int group = 0;  // that the next copy belongs to
    std::vector<Copy> copies;
    std::vector<uint32_t> unpublished;  // where its copies lie that the matrix units may not see yet
    bool may_multiply = false;
    std::vector<Begun> products;
};

Thread& this_thread() {
    static Thread threads[1024];
    Thread& mine = threads[thread_number()];
    if (mine.block != block_number()) {
        mine = {};
        mine.block = block_number();
    }
    return mine;
}

// By 16 bytes of shared memory: the block in which a thread has copied to it, and the barriers behind the block
// when the thread published that.
struct Copied {
    uint64_t block;
    bool published;
    uint32_t barriers;
};
Copied copied[(256 << 10) / 16];


float element(bool half_precision, const uint32_t* words, int number) {
    const auto bits = static_cast<uint16_t>(words[number / 2] >> 16 * (number % 2));
    return half_precision ? float(bits_as<__half>(bits)) : float(bits_as<__nv_bfloat16>(bits));
}

}  // namespace

void begin_copy(void* to, const void* from, bool wanted) {
    Thread& mine = this_thread();
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        fail("cp.async from or to an address that is not a multiple of 16");
    shared_address(to);
    mine.copies.push_back({to, from, wanted, mine.group});
}

void end_copy_group() { ++this_thread().group; }

void wait_for_copies(int groups_left) {
    Thread& mine = this_thread();
    std::vector<Copy> left;
    for (const Copy& copy : mine.copies) {
        if (copy.group >= mine.group - groups_left) {
            left.push_back(copy);
            continue;
        }
        check_access(copy.to, 16, true, 16);
        if (copy.wanted) {
            check_access(copy.from, 16, false, 16);
            std::memcpy(copy.to, copy.from, 16);
        } else {
            std::memset(copy.to, 0, 16);
        }
        const uint32_t place = shared_address(copy.to) / 16;
        if (place < std::size(copied)) {
            copied[place] = {block_number(), false, 0};
            mine.unpublished.push_back(place);
        }
    }
    mine.copies = left;
}

void load_transposed(const void* row, uint32_t* words) {
    check_access(row, 16, false, 16);
    struct Matrices {
        const void* row;
        uint32_t* words;
    } mine = {row, words};
    together(0xffffffffu, "ldmatrix.x4.trans", mine, [](Matrices* const* all) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint16_t pair[2];
                for (int i = 0; i < 2; ++i)
                    pair[i] = static_cast<const uint16_t*>(all[8 * matrix + lane % 4 * 2 + i]->row)[lane / 4];
                all[lane]->words[matrix] = pair[0] | uint32_t{pair[1]} << 16;
            }
        }
    });
}

void multiply_16x8x16(bool half_precision, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    struct Operands {
        bool half_precision;
        float* d;
        const uint32_t* a;
        uint32_t b[2];
    } mine = {half_precision, d, a, {b0, b1}};
    together(0xffffffffu, "mma.m16n8k16", mine, [](Operands* const* all) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const bool half_precision = all[lane]->half_precision;
            for (int i = 0; i < 8; ++i) {
                const int row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i % 2 + i / 4 * 8;
                a[row][k] = element(half_precision, all[lane]->a, i);
            }
            for (int i = 0; i < 4; ++i)
                b[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = element(half_precision, all[lane]->b, i);
        }
        for (int row = 0; row < 16; ++row) {
            for (int column = 0; column < 8; ++column) {
                float& d = all[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2];
                double sum = d;
                for (int k = 0; k < 16; ++k) sum += double{a[row][k]} * b[k][column];
                d = static_cast<float>(sum);
            }
        }
    });
}

void publish_to_products() {
    Thread& mine = this_thread();
    for (const uint32_t place : mine.unpublished) copied[place] = {block_number(), true, barriers_opened()};
    mine.unpublished.clear();
}

void begin_products() { this_thread().may_multiply = true; }

void multiply_64x16(const Product& product) {
    Thread& mine = this_thread();
    if (!mine.may_multiply) fail("calls wgmma without wgmma.fence since it has last waited");
    const int count = product.tiles * 4;
    Begun begun = {product, {}, std::vector<float>(count)};
    if (product.a_registers) std::memcpy(begun.a, product.a_registers, sizeof begun.a);
    // The sums so far, if the thread has begun them and not waited, are those of the product before.
    const Begun* before = nullptr;
    for (const Begun& other : mine.products)
        if (other.product.d == product.d) before = &other;
    if (product.accumulate && !before) begun.sums.assign(product.d, product.d + count);
    for (int i = 0; i < count; ++i) product.d[i] = NAN;
    mine.products.push_back(begun);
}

namespace {

// The element at (row, k) of an operand in shared memory, whose rows are the products' 64 or N and k their depth: PTX
// ISA, "matrix-descriptor" and "strides" of wgmma. The swizzle exchanges 16-byte chunks by address bits 7 and up.
uint16_t fetch(uint64_t descriptor, bool transposed, int row, int k) {
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                   stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62;
    if (descriptor >> 49 & 7 || mode == 0 || mode == 3)
        fail("wgmma with a descriptor 0x%zx that is not emulated", descriptor);
    const int width = mode == 1 ? 64 : 32;  // elements of a swizzled row
    const int outer = transposed ? k : row, inner = transposed ? row : k;
    uint32_t address = start + outer / 8 * stride + outer % 8 * width * 2;
    // Neighbours beyond a swizzled row are `leading` away; an operand of 16 neighbours has none there.
    address += transposed ? inner / width * leading + inner % width * 2 : inner * 2;
    address ^= (address >> 7 & (mode == 1 ? 7 : 3)) << 4;
    const void* const element = shared_pointer(address);
    check_access(element, 2, false, 2);
    const Copied& copy = copied[address / 16];
    if (copy.block == block_number() && (!copy.published || copy.barriers == barriers_opened()))
        fail("wgmma reads byte 0x%x of shared memory, copied there without %s since", address,
             copy.published ? "a barrier behind fence.proxy.async" : "fence.proxy.async");
    uint16_t bits;
    std::memcpy(&bits, element, sizeof bits);
    return bits;
}

void multiply(Begun* const (&all)[128]) {
    const Product& same = all[0]->product;
    static float a[64][16], b[16][128];
    for (int t = 0; t < 128; ++t) {
        const Product& p = all[t]->product;
        if (p.half_precision != same.half_precision || p.accumulate != same.accumulate || p.tiles != same.tiles ||
            p.b_is_transposed != same.b_is_transposed || p.a != same.a || p.b != same.b ||
            (p.a_registers == nullptr) != (same.a_registers == nullptr))
            fail("wgmma: thread %d of the warpgroup has other operands than the first", t);
        if (p.a_registers && std::memcmp(p.a_registers, all[t]->a, sizeof all[t]->a))
            fail("wgmma: thread %d has changed the left operand before it waited", t);
        for (int i = 0; i < 8 && p.a_registers; ++i)
            a[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][t % 4 * 2 + i % 2 + i / 4 * 8] =
                element(same.half_precision, all[t]->a, i);
    }
    const auto value = [&](uint64_t descriptor, bool transposed, int row, int k) {
        const uint32_t bits = fetch(descriptor, transposed, row, k);
        return element(same.half_precision, &bits, 0);
    };
    for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 64 && !same.a_registers; ++row) a[row][k] = value(same.a, false, row, k);
        for (int n = 0; n < 8 * same.tiles; ++n) b[k][n] = value(same.b, same.b_is_transposed, n, k);
    }
    for (int t = 0; t < 128; ++t) {
        for (int i = 0; i < 4 * same.tiles; ++i) {
            const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
            double sum = all[t]->sums[i];
            for (int k = 0; k < 16; ++k) sum += double{a[row][k]} * b[k][column];
            all[t]->sums[i] = static_cast<float>(sum);
        }
    }
}

}  // namespace

void wait_for_products() {
    struct Wait {
        Thread* thread;
    } mine = {&this_thread()};
    together_in_warpgroup("wgmma.wait_group", mine, [](Wait* const* all) {
        const size_t count = all[0]->thread->products.size();
        for (int t = 0; t < 128; ++t)
            if (all[t]->thread->products.size() != count) fail("wgmma: warps have begun different numbers of products");
        for (size_t i = 0; i < count; ++i) {
            Begun* begun[128];
            for (int t = 0; t < 128; ++t) {
                std::vector<Begun>& products = all[t]->thread->products;
                begun[t] = &products[i];
                for (size_t before = i; products[i].product.accumulate && before-- > 0;) {
                    if (products[before].product.d != products[i].product.d) continue;
                    products[i].sums = products[before].sums;
                    break;
                }
            }
            multiply(begun);
        }
    });
    for (const Begun& begun : mine.thread->products)
        std::memcpy(begun.product.d, begun.sums.data(), sizeof(float) * begun.sums.size());
    mine.thread->products.clear();
    mine.thread->may_multiply = false;
}

}  // namespace cuda_host
