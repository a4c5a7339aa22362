// bertfast._cpu: the launchers of cpu/kernels.h for Python, without a word of PyTorch.
//
// Tensors arrive as addresses (0 for null), so one build serves every PyTorch version; shapes, types and
// lifetimes are the caller's business. Arguments come in the order of the structs' members, and the GIL is free
// while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/encoder.h"
#include "cpu/fingerprint.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/weights.h"
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

Operand operand_of(int operand) {
    if (operand < 0 || operand > 2) throw std::invalid_argument("operand must be 0 (float32), 1 (bfloat16) or 2 (int8)");
    return static_cast<Operand>(operand);
}

Activation activation_of(int activation) {
    if (activation < 0 || activation > 2)
        throw std::invalid_argument("activation must be 0 (none), 1 (GELU) or 2 (its tanh form)");
    return static_cast<Activation>(activation);
}

void gemm(int dtype, int operand, Pointer x, int64_t x_stride, Pointer x_scale, Pointer x_zero, Pointer weight,
          Pointer weight_scale, Pointer weight_sums, Pointer bias, int activation, Pointer residual,
          int64_t residual_stride, Pointer out, int64_t out_stride, int64_t rows, int64_t cols, int64_t depth,
          int threads) {
    gemm_fwd({{operand_of(operand), x, x_stride, x_scale, x_zero}, weight, weight_scale, weight_sums, bias,
              activation_of(activation), residual, residual_stride, dtype_of(dtype), out, out_stride, rows, cols, depth},
             threads);
}

void operand(int dtype, Pointer x, int64_t x_stride, Pointer weight, Pointer bias, float eps, int out_dtype, Pointer out,
             int64_t out_stride, int operand, Pointer rows_out, int64_t rows_stride, Pointer scale, Pointer zero,
             int64_t rows, int64_t cols, int threads) {
    operand_fwd({dtype_of(dtype), x, x_stride, weight, bias, eps, dtype_of(out_dtype), out, out_stride,
                 {operand_of(operand), rows_out, rows_stride, scale, zero}, rows, cols},
                threads);
}

// A GEMM's operand, weight, scale, sums and bias; a layer's four of them, its norms' parameters and attention's scale.
using Linear = std::tuple<int, Pointer, Pointer, Pointer, Pointer>;
using Layer = std::tuple<std::array<Linear, 4>, std::array<Pointer, 4>, float>;

std::unique_ptr<Encoder> make_encoder(int64_t hidden, int64_t inner, int64_t heads, float eps, int activation,
                                      const std::vector<Layer>& layers) {
    const auto linear = [](const Linear& l) -> PackedLinear {
        return {operand_of(std::get<0>(l)), std::get<1>(l), std::get<2>(l), std::get<3>(l), std::get<4>(l)};
    };
    std::vector<EncoderLayer> native;
    for (const auto& [linears, norms, scale] : layers)
        native.push_back({linear(linears[0]), linear(linears[1]), linear(linears[2]), linear(linears[3]),
                          {norms[0], norms[1], norms[2], norms[3]}, scale});
    return std::make_unique<Encoder>(hidden, inner, heads, eps, activation_of(activation), std::move(native));
}

void run_encoder(const Encoder& encoder, int dtype, Pointer x, Pointer out, Pointer cu_seqlens, int64_t tokens,
                 int64_t sequences, int threads) {
    encoder.run(dtype_of(dtype), x, out, cu_seqlens, tokens, sequences, threads);
}

void pack(int dtype, int operand, Pointer weight, int64_t first, int64_t rows, int64_t depth, Pointer packed,
          Pointer scale, Pointer sums, int threads) {
    pack_weights(operand_of(operand), dtype_of(dtype), weight, first, rows, depth, packed, scale, sums, threads);
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
    module.def("gemm_fwd", gemm, unlocked());
    module.def("operand_fwd", operand, unlocked());
    module.def("pack_weights", pack, unlocked());
    module.def("packed_bytes", [](int operand, int64_t cols, int64_t depth) {
        return packed_bytes(operand_of(operand), cols, depth);
    });
    py::class_<Encoder>(module, "Encoder")
        .def(py::init(&make_encoder))
        .def("run", run_encoder, unlocked())
        .def("workspace_bytes", &Encoder::workspace_bytes);
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
