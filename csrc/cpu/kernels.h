// The CPU kernels of bertfast: what each launcher computes and what it is given.
//
// Every pointer is raw, every tensor dense and row-major unless a stride is named, every id int64. `dtype` is
// the type of all floating-point tensors of a call; statistics (mean, rstd, lse) and the gradients of vectors
// that are reduced over rows are float32 whatever it is. A null pointer means "not wanted" or "not there", and
// the comment says which of the two a parameter allows. Nothing here knows about PyTorch: one build serves
// every version of it.
//
// The kernels are compiled once per instruction set (see isa.h); the launchers declared here pick one at run
// time.
#pragma once

#include <cstdint>

namespace bertfast {

enum class DType : int { float32 = 0, bfloat16 = 1 };

// Dropout as in reference.dropout_multiplier: an element is kept where its 16 random bits are not below `threshold`, and
// then multiplied by 65536 / (65536 - threshold). threshold == 0 is no dropout. Attention draws only the upper 8 of the
// bits, and its threshold is a multiple of 256.
struct Dropout {
    uint32_t threshold = 0;
    uint64_t seed = 0;
};

// out = dropout(LayerNorm(word[ids] + position[position_ids] + type[token_type_ids]))
// Returns the index of the first token whose id, position or type is outside its table, or -1; nothing is
// read out of bounds, and `out` is unspecified when the answer is not -1.
struct EmbedLayerNorm {
    DType dtype;
    const int64_t *ids, *position_ids, *token_type_ids;        // [tokens]; token_type_ids may be null (all 0)
    const void *word, *position, *type;                        // [vocab, hidden], [positions, hidden], [types, hidden]
    const void *weight, *bias;                                 // [hidden]
    void* out;                                                 // [tokens, hidden]
    float *mean, *rstd;                                        // [tokens] or null
    int64_t tokens, hidden, vocab, positions, types;
    float eps;
    Dropout dropout;
};
int64_t embed_layer_norm_fwd(const EmbedLayerNorm&, int threads);

// Gradients of the above. The tables' gradients are accumulated in float32 and overwritten whole, rows that no
// token used included (as zeros).
struct EmbedLayerNormBackward {
    EmbedLayerNorm forward;                                    // out unused; mean and rstd as the forward wrote them
    const void* dout;                                          // [tokens, hidden]
    void *dword, *dposition, *dtype_table;                     // like the tables
    void *dweight, *dbias;                                     // [hidden], dtype of the call
};
void embed_layer_norm_bwd(const EmbedLayerNormBackward&, int threads);

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
void residual_layer_norm_fwd(const ResidualLayerNorm&, int threads);

struct ResidualLayerNormBackward {
    ResidualLayerNorm forward;                                 // out unused; mean and rstd as the forward wrote them
    const void* dout;                                          // [rows, cols]
    void* dx;                                                  // [rows, cols], or null without dropout (dx == dresidual)
    void* dresidual;                                           // [rows, cols]
    void *dx_bias, *dweight, *dbias;                           // [cols], dtype of the call; dx_bias may be null
};
void residual_layer_norm_bwd(const ResidualLayerNormBackward&, int threads);

// out = GELU(x + bias): erf form, or the tanh form of Hendrycks & Gimpel where `tanh_form`.
struct BiasGelu {
    DType dtype;
    const void *x, *bias;                                      // [rows, cols], [cols] or null
    void* out;                                                 // [rows, cols]
    int64_t rows, cols;
    bool tanh_form;
};
void bias_gelu_fwd(const BiasGelu&, int threads);

struct BiasGeluBackward {
    BiasGelu forward;                                          // out, if there, is made anew
    const void* dout;                                          // [rows, cols]
    void* dx;                                                  // [rows, cols], may be dout
    void* dbias;                                               // [cols] or null
};
void bias_gelu_bwd(const BiasGeluBackward&, int threads);

// out = dropout(softmax(scale q k^T)) v inside each sequence. qkv is [tokens, 3, heads, head_size] with the
// strides given in elements and a dense last axis; out is dense. cu_seqlens[b] .. cu_seqlens[b + 1] are the
// tokens of sequence b; lengths of 0 are allowed.
struct VarlenAttention {
    DType dtype;
    const void* qkv;
    int64_t token_stride, part_stride, head_stride;
    const int32_t* cu_seqlens;                                 // [sequences + 1]
    void* out;                                                 // [tokens, heads, head_size]
    float* lse;                                                // [heads, tokens] log-sum-exp of the scaled scores, or null
    int64_t tokens, sequences, heads, head_size;
    float scale;
    Dropout dropout;                                           // of element (sequence, head, query, key)
};
void varlen_attention_fwd(const VarlenAttention&, int threads);

struct VarlenAttentionBackward {
    VarlenAttention forward;                                   // out and lse as the forward wrote them
    const void* dout;                                          // [tokens, heads, head_size], dense
    void* dqkv;                                                // [tokens, 3, heads, head_size], dense
};
void varlen_attention_bwd(const VarlenAttentionBackward&, int threads);

}  // namespace bertfast
