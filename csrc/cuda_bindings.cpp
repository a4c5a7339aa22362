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

void norm_fwd(int dtype, Pointer x, Pointer x_bias, Pointer residual, Pointer weight, Pointer bias, Pointer out,
              Pointer mean, Pointer rstd, int64_t rows, int64_t cols, float eps, uint32_t threshold, Pointer seed,
              Pointer stream) {
    residual_layer_norm_fwd({dtype_of(dtype), x, x_bias, residual, weight, bias, out, mean, rstd, rows, cols, eps,
                             {threshold, seed}},
                            stream);
}

void norm_bwd(int dtype, Pointer dout, Pointer x, Pointer x_bias, Pointer residual, Pointer weight, Pointer mean,
              Pointer rstd, Pointer dx, Pointer dresidual, Pointer dx_bias, Pointer dweight, Pointer dbias,
              Pointer workspace, int64_t rows, int64_t cols, uint32_t threshold, Pointer seed, Pointer stream) {
    if (seed.address != 0 && dx.address == 0 && rows != 0 && cols != 0)
        throw std::invalid_argument("with dropout the gradient of x is not that of the residual, and needs room");
    residual_layer_norm_bwd({{dtype_of(dtype), x, x_bias, residual, weight, nullptr, nullptr, mean, rstd, rows, cols, 0,
                              {threshold, seed}},
                             dout, dx, dresidual, dx_bias, dweight, dbias, workspace},
                            stream);
}

void embedding_fwd(int dtype, Pointer ids, Pointer position_ids, Pointer token_type_ids, Pointer word, Pointer position,
                   Pointer type, Pointer weight, Pointer bias, Pointer out, Pointer mean, Pointer rstd, int64_t tokens,
                   int64_t hidden, int64_t vocabulary, int64_t positions, int64_t types, float eps, uint32_t threshold,
                   Pointer seed, Pointer stream) {
    embed_layer_norm_fwd({dtype_of(dtype), ids, position_ids, token_type_ids, word, position, type, weight, bias, out,
                          mean, rstd, tokens, hidden, vocabulary, positions, types, eps, {threshold, seed}},
                         stream);
}

void embedding_bwd(int dtype, Pointer dout, Pointer ids, Pointer position_ids, Pointer token_type_ids, Pointer word,
                   Pointer position, Pointer type, Pointer weight, Pointer mean, Pointer rstd, Pointer sorted,
                   Pointer order, Pointer dword, Pointer dposition, Pointer dtype_table, Pointer dweight, Pointer dbias,
                   Pointer dx, Pointer workspace, int64_t tokens, int64_t hidden, int64_t vocabulary, int64_t positions,
                   int64_t types, uint32_t threshold, Pointer seed, Pointer stream) {
    embed_layer_norm_bwd({{dtype_of(dtype), ids, position_ids, token_type_ids, word, position, type, weight, nullptr,
                           nullptr, mean, rstd, tokens, hidden, vocabulary, positions, types, 0, {threshold, seed}},
                          dout, sorted, order, dword, dposition, dtype_table, dweight, dbias, dx, workspace},
                         stream);
}

void attention_fwd(int dtype, Pointer qkv, int64_t token_stride, int64_t part_stride, int64_t head_stride,
                   Pointer cu_seqlens, Pointer order, Pointer out, Pointer lse, int64_t tokens, int64_t sequences,
                   int64_t heads, int64_t head_size, int64_t max_length, float scale, uint32_t threshold, Pointer seed,
                   bool warpgroups, Pointer stream) {
    varlen_attention_fwd({dtype_of(dtype), qkv, token_stride, part_stride, head_stride, cu_seqlens, order, out, lse,
                          tokens, sequences, heads, head_size, max_length, scale, {threshold, seed}, warpgroups},
                         stream);
}

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of bertfast: addresses, sizes and a stream in, results in place.";
    using unlocked = py::call_guard<py::gil_scoped_release>;
    module.def("bias_gelu_fwd", gelu_fwd, unlocked());
    module.def("bias_gelu_bwd", gelu_bwd, unlocked());
    module.def("residual_layer_norm_fwd", norm_fwd, unlocked());
    module.def("residual_layer_norm_bwd", norm_bwd, unlocked());
    module.def("embed_layer_norm_fwd", embedding_fwd, unlocked());
    module.def("embed_layer_norm_bwd", embedding_bwd, unlocked());
    module.def("varlen_attention_fwd", attention_fwd, unlocked());
    module.def("row_chunks", row_chunks);
    module.def("architectures", architectures);
    module.def("device_count", device_count, unlocked());
    module.def("driver_version", driver_version);
    module.def("runtime_version", runtime_version);
}

}  // namespace
}  // namespace bertfast
