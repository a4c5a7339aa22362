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
    int64_t out_stride = 0;                                    // elements from token to token of out; 0: dense
};
void varlen_attention_fwd(const VarlenAttention&, int threads);

struct VarlenAttentionBackward {
    VarlenAttention forward;                                   // out and lse as the forward wrote them
    const void* dout;                                          // [tokens, heads, head_size], dense
    void* dqkv;                                                // [tokens, 3, heads, head_size], dense
};
void varlen_attention_bwd(const VarlenAttentionBackward&, int threads);

// What a GEMM multiplies, and in what it adds up: float32; bfloat16 in float32; or, in int32, unsigned bytes of x
// with signed bytes of the weight. Four bytes of either, 1, 2 or 4 elements along the depth, are a word.
enum class Operand : int { float32 = 0, bfloat16 = 1, int8 = 2 };
constexpr int64_t elements_in_word(Operand operand) { return int64_t{1} << static_cast<int>(operand); }
constexpr int64_t words_for(Operand operand, int64_t depth) {
    return (depth + elements_in_word(operand) - 1) / elements_in_word(operand);
}

enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2 };

// Rows that a GEMM multiplies, as operand_fwd writes them: [rows, depth], each row of whole words, filled up with
// zeros. Of int8, element u stands for scale (u - zero), with a scale and a zero of its row's own, as in
// reference.quantise_rows; a row with anything that is not finite has the scale NaN.
struct OperandRows {
    Operand operand;
    void* data;
    int64_t stride;                                            // bytes from row to row, a multiple of 4
    float* scale;                                              // [rows], int8 only
    int32_t* zero;                                             // [rows], int8 only
};

// out = activation(x W^T + bias) + residual, with weights packed by pack_weights (weights.h). An element's sum
// runs over the depth in one order, whatever the number of rows or threads.
struct Gemm {
    OperandRows x;                                             // [rows, depth]
    const void* weight;                                        // [cols, depth], packed
    const float* weight_scale;                                 // [cols], int8 only
    const int32_t* weight_sums;                                // [cols], int8 only: of each row of W
    const float* bias;                                         // [cols] or null
    Activation activation;
    const float* residual;                                     // [rows, cols] or null; may be out
    int64_t residual_stride;                                   // elements
    DType out_dtype;
    void* out;                                                 // [rows, cols]
    int64_t out_stride;                                        // elements
    int64_t rows, cols, depth;
};
void gemm_fwd(const Gemm&, int threads);

// The next GEMM's rows from these; with `norm`, from LayerNorm of these, which is also written to `out`.
struct OperandOf {
    DType dtype;
    const void* x;                                             // [rows, cols]
    int64_t x_stride;                                          // elements
    const float *weight, *bias;                                // [cols]: LayerNorm's, or null: no norm
    float eps;
    DType out_dtype;
    void* out;                                                 // [rows, cols] or null; may be x
    int64_t out_stride;                                        // elements
    OperandRows rows_out;                                      // data may be null: not wanted
    int64_t rows, cols;
};
void operand_fwd(const OperandOf&, int threads);

}  // namespace bertfast
