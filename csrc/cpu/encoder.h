// The whole encoder of BERT as one call: what bertfast/layer.py computes op by op, for inference, below Python.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace bertfast {

// A GEMM's weight as pack_weights leaves it, and its bias.
struct PackedLinear {
    Operand operand;
    const void* weight;
    const float* scale;                                        // int8 only
    const int32_t* sums;                                       // int8 only
    const float* bias;
};

// One layer: y = LN(x + Attention(x) W + b); LN(y + GELU(y W1 + b1) W2 + b2).
struct EncoderLayer {
    PackedLinear qkv, attention, up, down;
    std::array<const float*, 4> norms;                         // weight and bias of the first norm and of the second
    float scale;                                               // of the attention scores
};

// Owns no parameter: whoever makes it keeps them alive and unchanged.
class Encoder {
public:
    Encoder(int64_t hidden, int64_t inner, int64_t heads, float eps, Activation activation,
            std::vector<EncoderLayer> layers);
    ~Encoder();

    // out = the last layer's output for x, both dense [tokens, hidden] of this dtype. Any number of threads may call.
    void run(DType dtype, const void* x, void* out, const int32_t* cu_seqlens, int64_t tokens, int64_t sequences,
             int threads) const;

    int64_t workspace_bytes() const;                           // what is kept for further calls

private:
    struct Group;
    class Pass;
    class Workspace;
    void run_group(DType dtype, const char* x, char* out, const Group& group, Workspace& workspace, int threads) const;
    std::unique_ptr<Workspace> take() const;
    void give_back(std::unique_ptr<Workspace> workspace) const;

    int64_t hidden_, inner_, heads_;
    float eps_;
    Activation activation_;
    std::vector<EncoderLayer> layers_;
    struct {
        int64_t rounded = 0, context = 0, qkv = 0, activated = 0, quantised = 0;
    } rows_;                                                   // bytes of a token in each piece of a workspace
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Workspace>> free_;     // those that no call is using
};

}  // namespace bertfast
