// bertfast._cuda: the launchers of cuda/kernels.h for Python, without a word of PyTorch.
//
// As in cpu_bindings.cpp, tensors arrive as addresses (0 for null), arguments in the order of the structs' members and
// the stream as its address, last. The current device must be the tensors'. The CUDA runtime is linked in: the module
// loads on machines without a driver, where device_count() is 0.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "bindings.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace bertfast {
namespace {

DType dtype_of(int dtype) {
    if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
    return static_cast<DType>(dtype);
}

void gelu_fwd(int dtype, Pointer x, Pointer bias, Pointer out, int64_t rows, int64_t cols, bool tanh_form,
              Pointer stream) {
    bias_gelu_fwd({dtype_of(dtype), x, bias, out, rows, cols, tanh_form}, stream);
}

void gelu_bwd(int dtype, Pointer dout, Pointer x, Pointer bias, Pointer dx, Pointer dbias, Pointer workspace,
              int64_t rows, int64_t cols, bool tanh_form, Pointer stream) {
    if (dbias.address != 0 && workspace.address == 0 && rows != 0 && cols != 0)
        throw std::invalid_argument("dbias needs a workspace of [row_chunks(rows), cols] float32");
    bias_gelu_bwd({{dtype_of(dtype), x, bias, nullptr, rows, cols, tanh_form}, dout, dx, dbias, workspace}, stream);
}

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of bertfast: addresses, sizes and a stream in, results in place.";
    using unlocked = py::call_guard<py::gil_scoped_release>;
    module.def("bias_gelu_fwd", gelu_fwd, unlocked());
    module.def("bias_gelu_bwd", gelu_bwd, unlocked());
    module.def("row_chunks", row_chunks);
    module.def("architectures", architectures);
    module.def("device_count", device_count, unlocked());
    module.def("driver_version", driver_version);
    module.def("runtime_version", runtime_version);
}

}  // namespace
}  // namespace bertfast
