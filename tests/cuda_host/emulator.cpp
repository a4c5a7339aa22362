// The scheduler of fibers, and what is checked while a kernel runs:
//
// - that every thread gets where the others wait for it, or the kernel would hang;
// - that global memory is touched only where the caller of cuda_host_allow has said a tensor lies, to the byte, and
//   only after griddepcontrol.wait in a launch that may overlap with the one before;
// - that shared memory is touched within its bounds, and two threads touch the same byte, one of them writing, only
//   with a barrier between them;
// - that loads and stores are aligned, and arrays are not left.
//
// The kernels are compiled with -fsanitize=thread,alignment,bounds, for which GCC calls a function at each load, each
// store and each doubtful pointer or index. The functions that it calls are these here, not those of its libraries.
// What is not initialised is no error but poison: NaN in any floating-point type.
#include "emulator.h"

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "include/cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {
namespace {

constexpr int most_threads = 1024, most_barriers = 16;
constexpr size_t stack_bytes = 256 << 10;  // of address space: what a fiber does not touch costs nothing
constexpr size_t shared_without_asking = 48 << 10, most_shared = 227 << 10;  // of sm_90
constexpr uint32_t static_window = 1 << 20;  // shared_address of static shared memory; dynamic memory starts at 0

struct Fiber {
    ucontext_t start;
    jmp_buf context;
    char* stack;
    uint3 index;
    bool started = false, left = false, waited_for_predecessors = false;
    const char* waits_at = nullptr;
    bool (*ready)(void*) = nullptr;  // of wait_until
    void* state = nullptr;
    uint32_t warp_epoch = 0;
};

struct Meeting {
    int first, count;
    uint32_t mask;
    const char* what;
    int missing;
    void* records[128];
};

struct Barrier {
    int arrived = 0, expected = 0;
    std::vector<int> waiting;
};

struct Range {
    uintptr_t begin, end;
};

// Who touched a byte of shared memory last, -1 for nobody. Two threads are ordered by a barrier of the block, or of
// their warp.
struct Touched {
    uint64_t block_epoch = 0;
    uint32_t warp_epoch = 0;
    int thread = -1;
};
struct Shadow {
    Touched writer, reader;
};

Fiber fibers[most_threads];
std::vector<int> runnable, sleeping;
std::vector<Meeting> meetings;
Barrier barriers[most_barriers];
std::vector<Range> tensors;
Range parameters, image;
std::map<const void*, int> dynamic_limits;
std::string message, first_message;
cudaError_t last_error = cudaSuccess;
std::mutex one_kernel;

jmp_buf scheduler;
int current = -1;  // the running thread, -1 outside of kernels
int threads, live;
uint64_t seed = 0, random_state = 0;
bool may_overlap, races_are_checked = true;
bool combining;  // the last to come looks at the others' stacks
void (*run_call)(const void*);
const void* call_to_run;

uint64_t block_epoch;
uint64_t blocks_begun;
alignas(1024) char dynamic_memory[most_shared];
size_t dynamic_bytes;
char* static_memory;
size_t static_bytes;
std::vector<Shadow> shadows;
thread_local char make_the_thread_local_block_exist;

int draw(int below) {
    if (seed == 0 || below < 2) return 0;
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return static_cast<int>((random_state >> 33) % static_cast<unsigned>(below));
}

void switch_to_scheduler() {
    if (_setjmp(fibers[current].context) == 0) _longjmp(scheduler, 1);
}

void sleep_at(const char* what) {
    fibers[current].waits_at = what;
    switch_to_scheduler();
    fibers[current].waits_at = nullptr;
}

void wake(int thread) { runnable.push_back(thread); }

void open(Barrier& barrier) {
    for (const int thread : barrier.waiting) wake(thread);
    barrier = {};
    ++block_epoch;
}

// The barrier of all threads opens too when the last one that has not come leaves the kernel.
void open_if_all_have_come() {
    if (barriers[0].arrived > 0 && barriers[0].expected == 0 && barriers[0].arrived == live) open(barriers[0]);
}

// A fiber outlives its block: making one costs two system calls.
void live_through_blocks() {
    for (;;) {
        run_call(call_to_run);
        fibers[current].left = true;
        --live;
        open_if_all_have_come();
        switch_to_scheduler();
    }
}

void resume(int thread) {
    Fiber& fiber = fibers[thread];
    current = thread;
    threadIdx = fiber.index;
    if (_setjmp(scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.context, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        if (!fiber.stack) {
            void* const memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            fiber.stack = static_cast<char*>(memory);
        }
        fiber.start.uc_stack.ss_sp = fiber.stack;
        fiber.start.uc_stack.ss_size = stack_bytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, live_through_blocks, 0);
        setcontext(&fiber.start);
    }
    current = -1;
}

std::string where() {
    char words[160];
    std::snprintf(words, sizeof words, "thread (%u, %u, %u) of block (%u, %u, %u)", threadIdx.x, threadIdx.y,
                  threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
    return words;
}

// Ends the kernel from the scheduler's side: the fibers are in the middle of something and will be made anew.
void abandon(const std::string& words) {
    message = words;
    for (Fiber& fiber : fibers) fiber.started = false;
}

void report_hang() {
    std::map<std::string, std::pair<int, int>> places;  // how many threads wait, and the first of them
    for (int t = 0; t < threads; ++t) {
        if (fibers[t].left) continue;
        auto& [count, first] = places.try_emplace(fibers[t].waits_at, 0, t).first->second;
        ++count;
    }
    std::string words = "the kernel hangs: of " + std::to_string(threads) + " threads of block (" +
                        std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                        std::to_string(blockIdx.z) + ") " + std::to_string(threads - live) + " have left it";
    for (const auto& [place, found] : places)
        words += ", " + std::to_string(found.first) + " (the first: " + std::to_string(found.second) + ") wait at " +
                 place;
    abandon(words);
}

bool run_block() {
    std::memset(dynamic_memory, 0xff, dynamic_bytes);
    std::memset(static_memory, 0xff, static_bytes);
    ++block_epoch;  // no race with what earlier blocks have done
    ++blocks_begun;
    runnable.clear(), sleeping.clear(), meetings.clear();
    for (Barrier& barrier : barriers) barrier = {};
    live = threads;
    for (int t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[t];
        fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
        fiber.left = fiber.waited_for_predecessors = false;
        fiber.waits_at = nullptr;
        fiber.warp_epoch = 1;
        wake(t);
    }
    // Rounds of all that can run: a thread that waits for another must not keep it from running.
    for (std::vector<int> round; live > 0;) {
        round.clear();
        round.swap(runnable);
        for (size_t i = 0; i < sleeping.size();) {
            const int thread = sleeping[i];
            if (!fibers[thread].ready(fibers[thread].state)) {
                ++i;
                continue;
            }
            sleeping.erase(sleeping.begin() + static_cast<long>(i));
            round.push_back(thread);
        }
        if (round.empty()) {
            report_hang();
            return false;
        }
        for (size_t i = 0; i < round.size(); ++i) {
            std::swap(round[i], round[i + static_cast<size_t>(draw(static_cast<int>(round.size() - i)))]);
            resume(round[i]);
            if (!message.empty()) return false;
        }
    }
    return true;
}

void find_module() {
    const auto visit = [](dl_phdr_info* info, size_t, void*) {
        bool is_this = false;
        Range all = {UINTPTR_MAX, 0};
        size_t thread_local_bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            const uintptr_t begin = info->dlpi_addr + segment.p_vaddr, end = begin + segment.p_memsz;
            if (segment.p_type == PT_TLS) thread_local_bytes = segment.p_memsz;
            if (segment.p_type != PT_LOAD) continue;
            all = {std::min(all.begin, begin), std::max(all.end, end)};
            const auto here = reinterpret_cast<uintptr_t>(&fibers);
            is_this = is_this || (begin <= here && here < end);
        }
        if (!is_this) return 0;
        image = all;
        static_memory = static_cast<char*>(info->dlpi_tls_data);
        static_bytes = thread_local_bytes;
        return 1;
    };
    make_the_thread_local_block_exist = 1;
    asm volatile("" ::"r"(&make_the_thread_local_block_exist) : "memory");
    dl_iterate_phdr(visit, nullptr);
    shadows.resize(sizeof dynamic_memory + static_bytes);
}

bool ordered(const Touched& before, int thread) {
    if (before.thread == -1 || before.thread == thread || before.block_epoch != block_epoch) return true;
    return before.thread / 32 == thread / 32 && before.warp_epoch != fibers[thread].warp_epoch;
}

// Reads are remembered by one thread alone, the last, which misses some races and invents none.
void check_race(Shadow* bytes, size_t count, bool writes, const void* address) {
    for (size_t i = 0; i < count; ++i) {
        const Touched* other = !ordered(bytes[i].writer, current)             ? &bytes[i].writer
                               : writes && !ordered(bytes[i].reader, current) ? &bytes[i].reader
                                                                              : nullptr;
        if (other)
            fail("%s shared memory at byte 0x%x, which thread %d has %s without a barrier since",
                 writes ? "writes" : "reads", shared_address(address), other->thread,
                 other == &bytes[i].writer ? "written" : "read");
        (writes ? bytes[i].writer : bytes[i].reader) = {block_epoch, fibers[current].warp_epoch,
                                                        current};
    }
}

void check(const void* pointer, size_t bytes, bool writes) {
    if (current < 0) return;
    const auto begin = reinterpret_cast<uintptr_t>(pointer), end = begin + bytes;
    const auto within = [&](uintptr_t from, size_t count) { return from <= begin && end <= from + count; };
    const auto stack = reinterpret_cast<uintptr_t>(fibers[current].stack);
    if (within(stack, stack_bytes)) return;
    if (within(reinterpret_cast<uintptr_t>(dynamic_memory), dynamic_bytes) ||
        within(reinterpret_cast<uintptr_t>(static_memory), static_bytes)) {
        const uint32_t at = shared_address(pointer);
        if (races_are_checked)
            check_race(&shadows[at < static_window ? at : at - static_window + sizeof dynamic_memory], bytes, writes,
                       pointer);
        return;
    }
    for (const Range& range : tensors) {
        if (!within(range.begin, range.end - range.begin)) continue;
        if (may_overlap && !fibers[current].waited_for_predecessors)
            fail("%s global memory before griddepcontrol.wait", writes ? "writes" : "reads");
        return;
    }
    if (within(reinterpret_cast<uintptr_t>(dynamic_memory), sizeof dynamic_memory))
        fail("%s %zu bytes behind the %zu of dynamic shared memory", writes ? "writes" : "reads", bytes, dynamic_bytes);
    if (!writes && (within(parameters.begin, parameters.end - parameters.begin) ||
                    within(image.begin, image.end - image.begin)))
        return;
    const auto distance = [&](const Range& r) { return begin < r.begin ? r.begin - begin : begin - r.end; };
    const auto nearest = std::min_element(tensors.begin(), tensors.end(), [&](const Range& a, const Range& b) {
        return distance(a) < distance(b);
    });
    std::string tail = "none is known";
    if (nearest != tensors.end())
        tail = "the nearest, of " + std::to_string(nearest->end - nearest->begin) + " bytes, begins " +
               std::to_string(static_cast<int64_t>(nearest->begin - begin)) + " bytes from there";
    fail("%s %zu bytes outside of every tensor: %s", writes ? "writes" : "reads", bytes, tail.c_str());
}

}  // namespace

void fail(const char* format, ...) {
    char words[400];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(words, sizeof words, format, arguments);
    va_end(arguments);
    abandon(where() + " " + words);
    _longjmp(scheduler, 1);
}

int thread_number() { return current; }
uint64_t block_number() { return blocks_begun; }
uint32_t barriers_opened() { return block_epoch; }

void meet(int first, int count, uint32_t mask, const char* what, void* record, Combine combine) {
    const int place = current - first;
    if (place < 0 || place >= count) fail("is not among the %d threads from %d on that meet in %s", count, first, what);
    if (first + count > threads && mask == 0xffffffffu && count > 32)
        fail("calls %s, for which the block of %d threads is too small", what, threads);
    if (!(mask >> place % 32 & 1)) fail("calls %s with a mask of 0x%x, which lacks its own lane", what, mask);
    auto found = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) {
        return m.first == first && m.count == count && m.mask == mask;
    });
    if (found == meetings.end()) {
        const int expected = __builtin_popcount(mask) * (count / 32);
        meetings.push_back({first, count, mask, what, expected, {}});
        found = meetings.end() - 1;
    }
    if (std::strcmp(found->what, what) != 0)
        fail("calls %s where others of its warp wait at %s", what, found->what);
    found->records[place] = record;
    if (--found->missing > 0) {
        sleep_at(what);
        return;
    }
    Meeting all = *found;
    meetings.erase(found);
    combining = true;
    combine(all.records, count);
    combining = false;
    for (int i = 0; i < count; ++i) {
        if (!all.records[i]) continue;
        ++fibers[first + i].warp_epoch;
        if (i != place) wake(first + i);
    }
    if (seed != 0) {  // or the last to come would always be the first to go on
        wake(current);
        sleep_at(what);
    }
}

void barrier(int id, int threads_expected, bool waits, const char* what) {
    if (id < 0 || id >= most_barriers) fail("calls %s %d: there are 16", what, id);
    Barrier& barrier = barriers[id];
    if (barrier.arrived > 0 && barrier.expected != threads_expected)
        fail("calls %s %d for %d threads where others came for %d", what, id, threads_expected, barrier.expected);
    barrier.expected = threads_expected;
    ++barrier.arrived;
    if (waits) barrier.waiting.push_back(current);
    if (threads_expected == 0)
        open_if_all_have_come();
    else if (barrier.arrived == threads_expected)
        open(barrier);
    if (waits) sleep_at(what);
}

void wait_until(bool (*ready)(void*), void* state, const char* what) {
    ++block_epoch;  // what it waits for orders memory in ways that only it knows
    if (ready(state)) return;
    Fiber& fiber = fibers[current];
    fiber.ready = ready, fiber.state = state;
    sleeping.push_back(current);
    sleep_at(what);
}

void check_access(const void* address, size_t bytes, bool writes, size_t alignment) {
    if (current >= 0 && reinterpret_cast<uintptr_t>(address) % alignment)
        fail("%s %zu bytes at an address that is not a multiple of %zu", writes ? "writes" : "reads", bytes, alignment);
    check(address, bytes, writes);
}

uint32_t shared_address(const void* pointer) {
    const auto address = static_cast<const char*>(pointer);
    if (dynamic_memory <= address && address <= dynamic_memory + sizeof dynamic_memory)
        return static_cast<uint32_t>(address - dynamic_memory);
    if (static_memory <= address && address <= static_memory + static_bytes)
        return static_window + static_cast<uint32_t>(address - static_memory);
    fail("takes the shared address of what is not in shared memory");
}

void* shared_pointer(uint32_t address) {
    if (address <= sizeof dynamic_memory) return dynamic_memory + address;
    if (address - static_window <= static_bytes) return static_memory + (address - static_window);
    fail("uses 0x%x as an address of shared memory", address);
}

void* dynamic_shared_memory() { return dynamic_memory; }

void wait_for_predecessors() { fibers[current].waited_for_predecessors = true; }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(const void*), const void* call,
                   size_t bytes) {
    const std::lock_guard<std::mutex> lock(one_kernel);
    const dim3 grid = config.gridDim, block = config.blockDim;
    const uint64_t size = uint64_t{block.x} * block.y * block.z;
    const auto asked = dynamic_limits.find(kernel);
    const size_t limit = asked == dynamic_limits.end() ? shared_without_asking : static_cast<size_t>(asked->second);
    if (size == 0 || size > most_threads || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu)
        return last_error = cudaErrorInvalidConfiguration;
    if (config.dynamicSmemBytes > limit) return last_error = cudaErrorInvalidValue;

    find_module();
    gridDim = grid, blockDim = block;
    threads = static_cast<int>(size);
    dynamic_bytes = config.dynamicSmemBytes;
    run_call = run, call_to_run = call;
    parameters = {reinterpret_cast<uintptr_t>(call), reinterpret_cast<uintptr_t>(call) + bytes};
    may_overlap = false;
    for (unsigned i = 0; i < config.numAttrs; ++i)
        may_overlap |= config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                       config.attrs[i].val.programmaticStreamSerializationAllowed;
    message.clear();
    combining = false;
    random_state = seed * 0x9E3779B97F4A7C15u + 1;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    // Blocks come in any order on a GPU: here from a drawn one on, and backwards for odd seeds.
    const uint64_t first = seed == 0 ? 0 : seed * 0x9E3779B97F4A7C15u % blocks;
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t b = (first + (seed % 2 ? blocks - i : i)) % blocks;
        blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y)};
        if (!run_block()) return last_error = cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

}  // namespace cuda_host

using namespace cuda_host;

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorLaunchFailure: return message.c_str();
    }
    return "unknown error";
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* card, int) {
    *card = {"the host, as a GPU", 9, 0, 4};
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = 4; break;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(most_shared); break;
    }
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || static_cast<size_t>(value) > most_shared) return last_error = cudaErrorInvalidValue;
    dynamic_limits[kernel] = value;
    return cudaSuccess;
}

// What the tests call, through ctypes.
extern "C" {
#define EXPORTED __attribute__((visibility("default")))

EXPORTED void cuda_host_allow(uintptr_t address, size_t bytes) { tensors.push_back({address, address + bytes}); }
EXPORTED void cuda_host_forget() { tensors.clear(); }
EXPORTED void cuda_host_shuffle(uint64_t with) { seed = with; }
EXPORTED void cuda_host_check_races(bool wanted) { races_are_checked = wanted; }

// What GCC calls: -fsanitize=thread before every access, -fsanitize=alignment,bounds where something is wrong.
void __tsan_read_range(const void* p, size_t bytes) {
    if (!combining) check(p, bytes, false);
}
void __tsan_write_range(const void* p, size_t bytes) {
    if (!combining) check(p, bytes, true);
}
#define CUDA_HOST_SIZE(n)                                                  \
    void __tsan_read##n(const void* p) { __tsan_read_range(p, n); }             \
    void __tsan_write##n(const void* p) { __tsan_write_range(p, n); }           \
    void __tsan_unaligned_read##n(const void* p) { __tsan_read_range(p, n); }   \
    void __tsan_unaligned_write##n(const void* p) { __tsan_write_range(p, n); }
CUDA_HOST_SIZE(1)
CUDA_HOST_SIZE(2)
CUDA_HOST_SIZE(4)
CUDA_HOST_SIZE(8)
CUDA_HOST_SIZE(16)
void __tsan_init() {}
void __tsan_func_entry(const void*) {}
void __tsan_func_exit() {}

struct Place {
    const char* file;
    uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(const Place* place, uintptr_t pointer) {
    if (current >= 0) fail("misaligned or null pointer 0x%zx (%s:%u)", pointer, place->file, place->line);
}
void __ubsan_handle_out_of_bounds(const Place* place, uintptr_t index) {
    if (current >= 0) fail("index %zd is outside of its array (%s:%u)", index, place->file, place->line);
}
}
