// CUDA's execution model on one thread of the host: what the sources of csrc/cuda run on where there is no GPU.
//
// Every thread of a block is a fiber with a stack of its own. A fiber runs until it has to wait for others, at a
// barrier or where a warp works as one, and then the scheduler goes on with another: in order, or in an order drawn
// from a seed, which makes results depend on a barrier that is missing. Blocks run one after another, drawn likewise.
//
// What a GPU would forgive, or would punish much later, ends the kernel with an error in words: see emulator.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_host {

// Ends the kernel; the launch reports the words, and which thread of which block it was.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The calling thread goes on where `count` threads from number `first` of the block on are all here, less those that
// are not in the mask, bit by bit modulo 32. Each brings a record, which stays on its own stack; the last to arrive
// combines them all, and in that no plain load or store is checked. `records` has the caller's number less `first` for
// index, null where a thread is not in the mask.
using Combine = void (*)(void* const* records, int count);
void meet(int first, int count, uint32_t mask, const char* what, void* record, Combine combine);

// What a warp does together. Record is any struct; combine sees 32 pointers, null for lanes not in the mask:
//
//     struct Shuffle { int value, source, result; } mine = {value, source};
//     together(mask, "__shfl_sync", mine, [](Shuffle* const* all) {
//         for (int lane = 0; lane < 32; ++lane)
//             if (all[lane]) all[lane]->result = all[all[lane]->source]->value;
//     });
int thread_number();  // threadIdx in one dimension
uint64_t block_number();  // of all blocks of all kernels, in the order in which they ran
uint32_t barriers_opened();  // of the block, so far
template <class Record, class Together, int threads = 32>
void together(uint32_t mask, const char* what, Record& mine, Together) {
    static_assert(sizeof(Together) == 1, "the combining function must not capture anything");
    meet(thread_number() / threads * threads, threads, mask, what, &mine, [](void* const* records, int) {
        // A lambda without captures has no state: any storage of its size will do to call it.
        alignas(Together) static char stateless[1];
        reinterpret_cast<Together&>(stateless)(reinterpret_cast<Record* const*>(records));
    });
}
// The same for the 128 threads of a warpgroup, as wgmma needs them.
template <class Record, class Together>
void together_in_warpgroup(const char* what, Record& mine, Together combine) {
    together<Record, Together, 128>(0xffffffffu, what, mine, combine);
}

// bar.sync and bar.arrive: barrier `id` opens when `threads` have come, 0 for all that have not left the kernel.
void barrier(int id, int threads, bool waits, const char* what);

// Lets other threads run until ready(state): what mbarriers and other ways of waiting are made of. A kernel in which
// nobody else can run, and nothing is ready, hangs, and is ended.
void wait_until(bool (*ready)(void*), void* state, const char* what);

// For what a PTX instruction reads and writes by itself: the checks that plain loads and stores get anyway. Ends the
// kernel where the address is not a multiple of `alignment`.
void check_access(const void* address, size_t bytes, bool writes, size_t alignment = 1);

// Shared memory as 32-bit addresses, which descriptors and mbarriers are made of.
uint32_t shared_address(const void*);
void* shared_pointer(uint32_t);
void* dynamic_shared_memory();

// griddepcontrol.wait: until then a kernel launched with programmatic serialization must not touch global memory.
void wait_for_predecessors();

}  // namespace cuda_host
