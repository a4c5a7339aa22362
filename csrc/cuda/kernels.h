// The CUDA kernels of bertfast: what each launcher computes and what it is given.
//
// As in cpu/kernels.h, every pointer is raw and every tensor dense and row-major; here it lies in the memory of the
// current device. `dtype` is the type of all floating-point tensors of a call but the workspaces, which are float32.
// A null pointer means "not wanted" or "not there". Nothing here knows about PyTorch, nor needs a CUDA header.
//
// A launcher only puts work on `stream`: it returns before the kernels have run, and reads and writes nothing after
// them. Memory comes from the caller, workspaces too. Two runs give the same bits, on any number of multiprocessors.
// Where a kernel cannot be launched it throws std::runtime_error with the op, the shape, the card and CUDA's reason.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bertfast {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

using Stream = void*;  // a cudaStream_t

// What this build holds code for: "80" or "90a" is machine code of that architecture, "100+PTX" is what the driver
// compiles for newer ones.
std::vector<std::string> architectures();
// The number of GPUs that the driver shows; 0 where there is no driver, or one that is too old for this build.
int device_count();
// The CUDA version (1000 major + 10 minor) that the driver supports, 0 without one; and the one this was built with.
int driver_version();
int runtime_version();

// A sum over rows takes a workspace of [row_chunks(rows), cols] float32: rows are summed in chunks that depend on
// their number alone, and the chunks' sums in their order.
int64_t row_chunks(int64_t rows);

// out = GELU(x + bias): erf form, or the tanh form of Hendrycks & Gimpel where `tanh_form`.
struct BiasGelu {
    DType dtype;
    const void *x, *bias;                                      // [rows, cols], [cols] or null
    void* out;                                                 // [rows, cols]
    int64_t rows, cols;
    bool tanh_form;
};
void bias_gelu_fwd(const BiasGelu&, Stream);

// dx = dout GELU'(x + bias), dbias = the sum of dx over the rows, before dx is rounded.
struct BiasGeluBackward {
    BiasGelu forward;                                          // out unused
    const void* dout;                                          // [rows, cols]
    void* dx;                                                  // [rows, cols]
    void* dbias;                                               // [cols] or null
    float* workspace;                                          // [row_chunks(rows), cols]; null without dbias
};
void bias_gelu_bwd(const BiasGeluBackward&, Stream);

}  // namespace bertfast
