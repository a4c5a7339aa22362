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

// Dropout as in reference.dropout_multiplier: an element is kept where its 16 random bits are not below `threshold`,
// and then multiplied by 65536 / (65536 - threshold). threshold == 0 is no dropout; the seed is read by the kernel.
// Attention draws only the upper 8 of the bits, and its threshold is a multiple of 256.
struct Dropout {
    uint32_t threshold = 0;
    const int64_t* seed = nullptr;
};

// out = LayerNorm(dropout(x + x_bias) + residual)
struct ResidualLayerNorm {
    DType dtype;
    const void *x, *x_bias, *residual;                         // [rows, cols], [cols] or null, [rows, cols]
    const void *weight, *bias;                                 // [cols]
    void* out;                                                 // [rows, cols]
    float *mean, *rstd;                                        // [rows] or null
    int64_t rows, cols;
    float eps;
    Dropout dropout;
};
void residual_layer_norm_fwd(const ResidualLayerNorm&, Stream);

struct ResidualLayerNormBackward {
    ResidualLayerNorm forward;                                 // bias, out, eps unused; mean and rstd as it wrote them
    const void* dout;                                          // [rows, cols]
    void* dx;                                                  // [rows, cols]; null without dropout: it is dresidual
    void* dresidual;                                           // [rows, cols]
    void *dx_bias, *dweight, *dbias;                           // [cols]; dx_bias may be null
    float* workspace;                                          // [3, row_chunks(rows), cols]
};
void residual_layer_norm_bwd(const ResidualLayerNormBackward&, Stream);

// out = dropout(LayerNorm(word[ids] + position[position_ids] + type[token_type_ids])). A token with an id, a position
// or a type that is outside of its table gets NaN, in its mean and rstd too: a GPU cannot say so without waiting.
struct EmbedLayerNorm {
    DType dtype;
    const int64_t *ids, *position_ids, *token_type_ids;        // [tokens]; token_type_ids may be null (all 0)
    const void *word, *position, *type;                        // [their number, hidden]
    const void *weight, *bias;                                 // [hidden]
    void* out;                                                 // [tokens, hidden]
    float *mean, *rstd;                                        // [tokens] or null
    int64_t tokens, hidden, vocabulary, positions, types;
    float eps;
    Dropout dropout;
};
void embed_layer_norm_fwd(const EmbedLayerNorm&, Stream);

// Each row of a table's gradient is the sum over its tokens in the order of `order`, in float32. What is outside of a
// table is left out; its NaN is in dweight and dbias.
struct EmbedLayerNormBackward {
    EmbedLayerNorm forward;                                    // bias, out, eps unused; mean and rstd as it wrote them
    const void* dout;                                          // [tokens, hidden]
    const int64_t *sorted, *order;                             // [3, tokens]: ids, positions and types in ascending
                                                               // order, and the tokens that they are of
    void *dword, *dposition, *dtype_table;                     // like the tables, all zeros
    void *dweight, *dbias;                                     // [hidden]
    float* dx;                                                 // [tokens, hidden], a workspace
    float* workspace;                                          // [8, row_chunks(tokens), hidden]
};
void embed_layer_norm_bwd(const EmbedLayerNormBackward&, Stream);

// out = dropout(softmax(scale q k^T)) v inside each sequence, in bfloat16 or float16, of head size 32 or 64 and of
// sequences of at most 128 tokens. qkv is [tokens, 3, heads, head_size] with the strides given in elements and a dense
// last axis; its address and strides are multiples of 16 bytes. The tokens of sequence b are cu_seqlens[b] ..
// cu_seqlens[b + 1]; one that has more than max_length of them gets NaN.
struct VarlenAttention {
    DType dtype;
    const void* qkv;
    int64_t token_stride, part_stride, head_stride;
    const int32_t* cu_seqlens;                                 // [sequences + 1]
    const int32_t* order;                                      // [sequences] in which to begin them, or null
    void* out;                                                 // [tokens, heads, head_size], dense
    float* lse;                                                // [heads, tokens] log-sum-exp of scaled scores, or null
    int64_t tokens, sequences, heads, head_size, max_length;
    float scale;
    Dropout dropout;                                           // of element (sequence, head, query, key)
    bool warpgroups;                                           // use wgmma: the device is sm_90, and sm_90a was built
};
void varlen_attention_fwd(const VarlenAttention&, Stream);

}  // namespace bertfast
