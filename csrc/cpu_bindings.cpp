// bertfast._cpu: the launchers of cpu/kernels.h for Python, without a word of PyTorch.
//
// Tensors arrive as addresses (0 for null), so one build serves every PyTorch version; shapes, types and
// lifetimes are the caller's business. Arguments come in the order of the structs' members, and the GIL is free
// while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/fingerprint.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "guard.h"

namespace py = pybind11;

namespace bertfast {
namespace {

DType dtype_of(int dtype) {
    if (dtype != 0 && dtype != 1) throw std::invalid_argument("dtype must be 0 (float32) or 1 (bfloat16)");
    return static_cast<DType>(dtype);
}

Dropout dropout_of(uint32_t threshold, Seed seed) {
    if (threshold > 65535) throw std::invalid_argument("threshold must be below 65536");
    return {threshold, seed.value};
}

int64_t embed_fwd(int dtype, Pointer ids, Pointer position_ids, Pointer token_type_ids, Pointer word, Pointer position,
                  Pointer type, Pointer weight, Pointer bias, Pointer out, Pointer mean, Pointer rstd, int64_t tokens,
                  int64_t hidden, int64_t vocab, int64_t positions, int64_t types, float eps, uint32_t threshold,
                  Seed seed, int threads) {
    return embed_layer_norm_fwd(
        {dtype_of(dtype), ids, position_ids, token_type_ids, word, position, type, weight, bias, out, mean, rstd,
         tokens, hidden, vocab, positions, types, eps, dropout_of(threshold, seed)},
        threads);
}

void embed_bwd(int dtype, Pointer dout, Pointer ids, Pointer position_ids, Pointer token_type_ids, Pointer word,
               Pointer position, Pointer type, Pointer weight, Pointer bias, Pointer mean, Pointer rstd, Pointer dword,
               Pointer dposition, Pointer dtype_table, Pointer dweight, Pointer dbias, int64_t tokens, int64_t hidden,
               int64_t vocab, int64_t positions, int64_t types, uint32_t threshold, Seed seed, int threads) {
    const EmbedLayerNorm forward = {dtype_of(dtype), ids, position_ids, token_type_ids, word, position, type, weight,
                                    bias, nullptr, mean, rstd, tokens, hidden, vocab, positions, types, 0,
                                    dropout_of(threshold, seed)};
    embed_layer_norm_bwd({forward, dout, dword, dposition, dtype_table, dweight, dbias}, threads);
}

void norm_fwd(int dtype, Pointer x, Pointer x_bias, Pointer residual, Pointer weight, Pointer bias, Pointer out,
              Pointer mean, Pointer rstd, int64_t rows, int64_t cols, float eps, uint32_t threshold, Seed seed,
              int threads) {
    residual_layer_norm_fwd({dtype_of(dtype), x, x_bias, residual, weight, bias, out, mean, rstd, rows, cols, eps,
                             dropout_of(threshold, seed)},
                            threads);
}

void norm_bwd(int dtype, Pointer dout, Pointer x, Pointer x_bias, Pointer residual, Pointer weight, Pointer mean,
              Pointer rstd, Pointer dx, Pointer dresidual, Pointer dx_bias, Pointer dweight, Pointer dbias,
              int64_t rows, int64_t cols, uint32_t threshold, Seed seed, int threads) {
    const ResidualLayerNorm forward = {dtype_of(dtype), x, x_bias, residual, weight, nullptr, nullptr, mean, rstd,
                                       rows, cols, 0, dropout_of(threshold, seed)};
    residual_layer_norm_bwd({forward, dout, dx, dresidual, dx_bias, dweight, dbias}, threads);
}

void gelu_fwd(int dtype, Pointer x, Pointer bias, Pointer out, int64_t rows, int64_t cols, bool tanh_form,
              int threads) {
    bias_gelu_fwd({dtype_of(dtype), x, bias, out, rows, cols, tanh_form}, threads);
}

void gelu_bwd(int dtype, Pointer dout, Pointer x, Pointer bias, Pointer out, Pointer dx, Pointer dbias, int64_t rows,
              int64_t cols, bool tanh_form, int threads) {
    bias_gelu_bwd({{dtype_of(dtype), x, bias, out, rows, cols, tanh_form}, dout, dx, dbias}, threads);
}

void attention_fwd(int dtype, Pointer qkv, int64_t token_stride, int64_t part_stride, int64_t head_stride,
                   Pointer cu_seqlens, Pointer out, Pointer lse, int64_t tokens, int64_t sequences, int64_t heads,
                   int64_t head_size, float scale, uint32_t threshold, Seed seed, int threads) {
    varlen_attention_fwd({dtype_of(dtype), qkv, token_stride, part_stride, head_stride, cu_seqlens, out, lse, tokens,
                          sequences, heads, head_size, scale, dropout_of(threshold, seed)},
                         threads);
}

void attention_bwd(int dtype, Pointer dout, Pointer qkv, int64_t token_stride, int64_t part_stride,
                   int64_t head_stride, Pointer cu_seqlens, Pointer out, Pointer lse, Pointer dqkv, int64_t tokens,
                   int64_t sequences, int64_t heads, int64_t head_size, float scale, uint32_t threshold, Seed seed,
                   int threads) {
    const VarlenAttention forward = {dtype_of(dtype), qkv, token_stride, part_stride, head_stride, cu_seqlens, out,
                                     lse, tokens, sequences, heads, head_size, scale, dropout_of(threshold, seed)};
    varlen_attention_bwd({forward, dout, dqkv}, threads);
}

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "CPU kernels of bertfast: addresses and sizes in, results in place.";
    using unlocked = py::call_guard<py::gil_scoped_release>;
    module.def("embed_layer_norm_fwd", embed_fwd, unlocked());
    module.def("embed_layer_norm_bwd", embed_bwd, unlocked());
    module.def("residual_layer_norm_fwd", norm_fwd, unlocked());
    module.def("residual_layer_norm_bwd", norm_bwd, unlocked());
    module.def("bias_gelu_fwd", gelu_fwd, unlocked());
    module.def("bias_gelu_bwd", gelu_bwd, unlocked());
    module.def("varlen_attention_fwd", attention_fwd, unlocked());
    module.def("varlen_attention_bwd", attention_bwd, unlocked());
    py::class_<Facts>(module, "Facts").def(py::init<const py::list&>()).def("hold", &Facts::hold);
    py::class_<Fingerprint>(module, "Fingerprint")
        .def(py::init<Fingerprint::Tensors>())
        .def("matches", &Fingerprint::matches);
    module.def("use_openmp", [](Pointer address) { use_openmp(reinterpret_cast<GompParallel>(address.address)); });
    module.def("isa", isa);
    module.def("set_isa", set_isa);
    module.def("available_isas", available_isas);
}

}  // namespace
}  // namespace bertfast
