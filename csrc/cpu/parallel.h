// Loops over independent blocks on PyTorch's own OpenMP threads, and memory that each of those threads keeps.
//
// A second OpenMP runtime in the process would bring a second set of threads that fight the first for the cores
// (and, with some pairs of runtimes, deadlocks). So this module links none: Python hands over the address of
// GOMP_parallel in the runtime that PyTorch has loaded, and without that address loops run serially.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bertfast {

// void GOMP_parallel(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags)
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
void use_openmp(GompParallel gomp_parallel);

// Calls body(context, i) for each i in [0, n), in any order. Which thread takes which i is left to an atomic
// counter, so a result must not depend on it. The first exception a body throws is thrown again here.
void run_parallel(int64_t n, int threads, void (*body)(void* context, int64_t i), void* context);

// At least `bytes` bytes, aligned to a cache line, that belong to this thread until it asks for the same slot
// again. Contents are unspecified. Throws std::bad_alloc.
constexpr int scratch_slots = 8;
void* scratch_bytes(int slot, size_t bytes);

// `static`, because a kernel file's template must not be merged with its namesake of another instruction set.
template <class F>
static inline void parallel_for(int64_t n, int threads, F f) {
    run_parallel(n, threads, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &f);
}

template <class T>
static inline T* scratch(int slot, int64_t n) {
    return static_cast<T*>(scratch_bytes(slot, static_cast<size_t>(n) * sizeof(T)));
}

// f(begin, end) over blocks of the rows of a [rows, columns] tensor. A block is worth several times the few
// microseconds that starting a team costs, and a tensor of one block never leaves the calling thread.
template <class F>
static inline void parallel_rows(int64_t rows, int64_t columns, int threads, F f) {
    constexpr int64_t elements = 16384;
    const int64_t block = columns < elements ? elements / (columns < 1 ? 1 : columns) : 1;
    parallel_for((rows + block - 1) / block, threads, [&](int64_t i) {
        const int64_t begin = i * block;
        f(begin, begin + block < rows ? begin + block : rows);
    });
}

}  // namespace bertfast
