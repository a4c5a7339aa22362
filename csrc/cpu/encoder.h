// The whole encoder of BERT as one call: what bertfast/layer.py computes op by op, for inference, below Python.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace bertfast {

// Memory on a cache line's border.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t bytes);                             // throws std::bad_alloc
    template <class T>
    T* as() const {
        return static_cast<T*>(data_.get());
    }
    size_t bytes() const { return bytes_; }

private:
    struct Free {
        void operator()(void* data) const;
    };
    std::unique_ptr<void, Free> data_;
    size_t bytes_ = 0;
};

// A GEMM's weight and bias, packed.
struct PackedLinear {
    Operand operand;
    int64_t cols, depth;
    Buffer weight, scale, sums, bias;

    // Of weights that lie below one another, [rows, depth] each, and as many biases.
    PackedLinear(Operand operand, DType dtype, int64_t depth, const std::vector<const void*>& weights,
                 const std::vector<const void*>& biases, int64_t rows, int threads);
    int64_t bytes() const;
};

// One layer: y = LN(x + Attention(x) W + b); LN(y + GELU(y W1 + b1) W2 + b2).
struct EncoderLayer {
    PackedLinear qkv, attention, up, down;
    Buffer norms[4];                                           // weight and bias of the first norm and of the second
    float scale;                                               // of the attention scores
};

class Encoder {
public:
    Encoder(int64_t hidden, int64_t inner, int64_t heads, float eps, Activation activation);

    // Copies a layer's parameters: those of query, key, value (weights, then biases), and weight and bias of the
    // attention's output, its norm, the two feed-forward layers and the last norm. operands: what the GEMMs (QKV,
    // attention's output, up, down) multiply.
    using Parameters = std::array<const void*, 16>;
    void add_layer(DType dtype, const Parameters& parameters, const std::array<Operand, 4>& operands, float scale,
                   int threads);

    // out = the last layer's output for x, both dense [tokens, hidden] of this dtype. Any number of threads may call.
    void run(DType dtype, const void* x, void* out, const int32_t* cu_seqlens, int64_t tokens, int64_t sequences,
             int threads) const;

    int64_t bytes() const;                                     // of packed parameters
    int64_t workspace_bytes() const;                           // kept for further calls

private:
    struct Borders;
    struct Workspace;
    void run_group(DType dtype, const char* x, char* out, const Borders& borders, Workspace& workspace,
                   int threads) const;
    Workspace take() const;
    void give_back(Workspace) const;

    int64_t hidden_, inner_, heads_;
    float eps_;
    Activation activation_;
    std::vector<EncoderLayer> layers_;
    mutable std::mutex mutex_;
    mutable std::vector<Buffer> free_;                         // workspaces that no call is using
};

}  // namespace bertfast
