// The host's part that needs no device compiler: what was built, what the driver shows, what has gone wrong.
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <sstream>
#include <stdexcept>

#include "launch.h"

namespace bertfast {

std::vector<std::string> architectures() {
    std::vector<std::string> names;
    std::istringstream all(BERTFAST_ARCHITECTURES);
    for (std::string name; all >> name;) names.push_back(name);
    return names;
}

int device_count() {
    int count = 0;
    const bool found = cudaGetDeviceCount(&count) == cudaSuccess;
    cudaGetLastError();  // or the next launch would report it
    return found ? count : 0;
}

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() { return CUDART_VERSION; }

bool kernels_can_overlap() {
    static std::array<std::atomic<int>, 64> major_of;  // 0 where it has not been asked for
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device < 0) return false;
    if (device < static_cast<int>(major_of.size())) major = major_of[device];
    if (major == 0) {
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
        if (device < static_cast<int>(major_of.size())) major_of[device] = major;
    }
    return major >= 9;
}

int64_t row_chunks(int64_t rows) { return divide_up(rows, chunk_length(rows)); }

void check_launch(const char* op, DType dtype, std::initializer_list<int64_t> shape) {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return;
    const char* const types[] = {"float32", "bfloat16", "float16"};
    std::ostringstream words;
    words << op << " of (";
    for (const int64_t& size : shape) words << (&size == shape.begin() ? "" : ", ") << size;
    words << ") " << types[static_cast<int>(dtype)] << " failed on ";
    int device = 0;
    cudaDeviceProp card;
    if (cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&card, device) == cudaSuccess)
        words << "cuda:" << device << " (" << card.name << ", sm_" << card.major << card.minor << ")";
    else
        words << "a machine without a usable GPU";
    words << ": " << cudaGetErrorString(error) << " (bertfast._cuda was built for " << BERTFAST_ARCHITECTURES << ")";
    cudaGetLastError();
    throw std::runtime_error(words.str());
}

}  // namespace bertfast
