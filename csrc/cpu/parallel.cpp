#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>

namespace bertfast {
namespace {

GompParallel gomp_parallel = nullptr;

struct Loop {
    int64_t n;
    void (*body)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
};

// What every thread of the team runs. Nothing may be thrown across GOMP_parallel, a C function.
void work(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    try {
        for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.n;) loop.body(loop.context, i);
    } catch (...) {
        loop.next.store(loop.n, std::memory_order_relaxed);
        if (!loop.failed.exchange(true)) loop.error = std::current_exception();
    }
}

struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[scratch_slots];

}  // namespace

void use_openmp(GompParallel address) { gomp_parallel = address; }

void run_parallel(int64_t n, int threads, void (*body)(void*, int64_t), void* context) {
    if (n <= 1 || threads <= 1 || !gomp_parallel) {
        for (int64_t i = 0; i < n; ++i) body(context, i);
        return;
    }
    Loop loop;
    loop.n = n;
    loop.body = body;
    loop.context = context;
    // Always the full team, even for n < threads: libgomp ends the threads that a smaller team leaves over and
    // would have to start them again for PyTorch's next loop.
    gomp_parallel(work, &loop, static_cast<unsigned>(threads), 0);
    if (loop.error) std::rethrow_exception(loop.error);
}

void* scratch_bytes(int slot, size_t bytes) {
    constexpr size_t line = 64;
    Buffer& buffer = buffers[slot];
    if (bytes > buffer.size || !buffer.data) {
        std::free(buffer.data);
        buffer.size = 0;
        const size_t size = (bytes + line) / line * line;
        buffer.data = std::aligned_alloc(line, size);
        if (!buffer.data) throw std::bad_alloc();
        buffer.size = size;
    }
    return buffer.data;
}

}  // namespace bertfast
