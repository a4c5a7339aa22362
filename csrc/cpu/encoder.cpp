// See encoder.h. A call goes through the layers with groups of whole sequences of about `group_tokens` tokens, so that
// its memory does not grow with the batch and stays in the caches; weights are read anew for each group, which costs a
// few per cent of what computing it does. The residual stream and all statistics are float32, whatever the GEMMs
// multiply. Every step below is one loop over PyTorch's OpenMP threads.
#include "encoder.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "weights.h"

namespace bertfast {
namespace {

constexpr int64_t line = 64, group_tokens = 2048, feed_forward_rows = 512;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of an odd number of cache lines, so that the rows of a tile do not all fall into the same sets of the cache.
int64_t row_bytes(int64_t bytes) { return (round_up(bytes, line) / line | 1) * line; }

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// What goes into a GEMM before it is quantised.
DType dtype_for(Operand operand) { return operand == Operand::float32 ? DType::float32 : DType::bfloat16; }

Buffer as_float(DType dtype, const void* values, int64_t n) {
    Buffer result(sizeof(float) * n);
    for (int64_t i = 0; i < n; ++i) {
        if (dtype == DType::float32) {
            result.as<float>()[i] = static_cast<const float*>(values)[i];
        } else {
            const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(values)[i]) << 16;
            std::memcpy(result.as<float>() + i, &bits, sizeof bits);
        }
    }
    return result;
}

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
    data_.reset(std::aligned_alloc(line, static_cast<size_t>(round_up(static_cast<int64_t>(bytes), line) + line)));
    if (!data_) throw std::bad_alloc();
}

void Buffer::Free::operator()(void* data) const { std::free(data); }

PackedLinear::PackedLinear(Operand operand, DType dtype, int64_t depth, const std::vector<const void*>& weights,
                           const std::vector<const void*>& biases, int64_t rows, int threads)
    : operand(operand),
      cols(rows * static_cast<int64_t>(weights.size())),
      depth(depth),
      weight(static_cast<size_t>(packed_bytes(operand, cols, depth))),
      scale(operand == Operand::int8 ? sizeof(float) * cols : 0),
      sums(operand == Operand::int8 ? sizeof(int32_t) * cols : 0),
      bias(sizeof(float) * cols) {
    std::memset(weight.as<char>(), 0, weight.bytes());
    for (size_t i = 0; i < weights.size(); ++i) {
        const int64_t first = rows * static_cast<int64_t>(i);
        pack_weights(operand, dtype, weights[i], first, rows, depth, weight.as<void>(), scale.as<float>(),
                     sums.as<int32_t>(), threads);
        const Buffer part = as_float(dtype, biases[i], rows);
        std::memcpy(bias.as<float>() + first, part.as<float>(), part.bytes());
    }
}

int64_t PackedLinear::bytes() const {
    return static_cast<int64_t>(weight.bytes() + scale.bytes() + sums.bytes() + bias.bytes());
}

Encoder::Encoder(int64_t hidden, int64_t inner, int64_t heads, float eps, Activation activation)
    : hidden_(hidden), inner_(inner), heads_(heads), eps_(eps), activation_(activation) {}

void Encoder::add_layer(DType dtype, const Parameters& p, const std::array<Operand, 4>& operands, float scale,
                        int threads) {
    layers_.push_back({{operands[0], dtype, hidden_, {p[0], p[1], p[2]}, {p[3], p[4], p[5]}, hidden_, threads},
                       {operands[1], dtype, hidden_, {p[6]}, {p[7]}, hidden_, threads},
                       {operands[2], dtype, hidden_, {p[10]}, {p[11]}, inner_, threads},
                       {operands[3], dtype, inner_, {p[12]}, {p[13]}, hidden_, threads},
                       {as_float(dtype, p[8], hidden_), as_float(dtype, p[9], hidden_),
                        as_float(dtype, p[14], hidden_), as_float(dtype, p[15], hidden_)},
                       scale});
}

int64_t Encoder::bytes() const {
    int64_t total = 0;
    for (const EncoderLayer& layer : layers_) {
        for (const PackedLinear* linear : {&layer.qkv, &layer.attention, &layer.up, &layer.down})
            total += linear->bytes();
        for (const Buffer& norm : layer.norms) total += static_cast<int64_t>(norm.bytes());
    }
    return total;
}

int64_t Encoder::workspace_bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t total = 0;
    for (const Buffer& buffer : free_) total += static_cast<int64_t>(buffer.bytes());
    return total;
}

// A group's sequences: cu_seqlens from 0 on, and where it begins in the batch.
struct Encoder::Borders {
    std::vector<int32_t> cu_seqlens;
    int64_t first_token, tokens;
};

// One call's memory, in pieces that last until the next group.
struct Encoder::Workspace {
    Buffer buffer;
    size_t used = 0;

    template <class T>
    T* take(int64_t bytes) {
        T* const piece = reinterpret_cast<T*>(buffer.as<char>() + used);
        used += static_cast<size_t>(round_up(bytes, line));
        return piece;
    }
};

Encoder::Workspace Encoder::take() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Workspace workspace;
    if (!free_.empty()) {
        workspace.buffer = std::move(free_.back());
        free_.pop_back();
    }
    return workspace;
}

void Encoder::give_back(Workspace workspace) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(workspace.buffer));
}

void Encoder::run_group(DType dtype, const char* x, char* out, const Borders& borders, Workspace& workspace,
                        int threads) const {
    const int64_t tokens = borders.tokens, fed = std::min(tokens, feed_forward_rows);
    const int64_t hidden_row = row_bytes(4 * hidden_), inner_row = row_bytes(4 * inner_);
    const int64_t wanted = tokens * (3 * hidden_row + 12 * hidden_ + 8) + fed * (2 * inner_row + 8) + 16 * line;
    if (workspace.buffer.bytes() < static_cast<size_t>(wanted)) {
        workspace.buffer = Buffer();
        workspace.buffer = Buffer(static_cast<size_t>(wanted));
    }
    workspace.used = 0;
    float* const stream = workspace.take<float>(tokens * hidden_row);  // the residual stream
    char* const rounded = workspace.take<char>(tokens * hidden_row);   // the same as a GEMM's operand
    char* const context = workspace.take<char>(tokens * hidden_row);
    char* const qkv = workspace.take<char>(tokens * 12 * hidden_);
    char* const activated = workspace.take<char>(fed * inner_row);
    char* const quantised = workspace.take<char>(fed * inner_row);
    float* const scale = workspace.take<float>(4 * tokens);
    int32_t* const zero = workspace.take<int32_t>(4 * tokens);
    float* const fed_scale = workspace.take<float>(4 * fed);
    int32_t* const fed_zero = workspace.take<int32_t>(4 * fed);
    const int64_t stream_stride = hidden_row / 4;

    const auto rows_for = [&](Operand operand) -> OperandRows {
        if (operand == Operand::float32) return {operand, stream, hidden_row, nullptr, nullptr};
        return {operand, rounded, row_bytes(hidden_ * 4 / elements_in_word(operand)), scale, zero};
    };
    // What operand_fwd has to write besides the stream.
    const auto besides = [&](Operand operand) -> OperandRows {
        return operand == Operand::float32 ? OperandRows{} : rows_for(operand);
    };
    const auto multiply = [&](const PackedLinear& linear, const OperandRows& rows, int64_t count, Activation activation,
                              const float* residual, DType out_dtype, void* result, int64_t stride) {
        gemm_fwd({rows, linear.weight.as<void>(), linear.scale.as<float>(), linear.sums.as<int32_t>(),
                  linear.bias.as<float>(), activation, residual, stream_stride, out_dtype, result, stride, count,
                  linear.cols, linear.depth},
                 threads);
    };

    operand_fwd({dtype, x, hidden_, nullptr, nullptr, 0, DType::float32, stream, stream_stride, besides(layers_.front().qkv.operand),
                 tokens, hidden_},
                threads);
    for (size_t i = 0; i < layers_.size(); ++i) {
        const EncoderLayer& layer = layers_[i];

        const DType attended = dtype_for(layer.attention.operand);
        multiply(layer.qkv, rows_for(layer.qkv.operand), tokens, Activation::none, nullptr, attended, qkv, 3 * hidden_);
        const int64_t context_row = row_bytes(hidden_ * size_of(attended));
        varlen_attention_fwd({attended, qkv, 3 * hidden_, hidden_, hidden_ / heads_, borders.cu_seqlens.data(), context,
                              nullptr, tokens, static_cast<int64_t>(borders.cu_seqlens.size()) - 1, heads_,
                              hidden_ / heads_, layer.scale, {}, context_row / size_of(attended)},
                             threads);
        OperandRows attention_rows = {layer.attention.operand, context, context_row, nullptr, nullptr};
        if (layer.attention.operand == Operand::int8) {
            attention_rows = rows_for(Operand::int8);
            operand_fwd({attended, context, context_row / 2, nullptr, nullptr, 0, attended, nullptr, 0, attention_rows, tokens,
                         hidden_},
                        threads);
        }
        multiply(layer.attention, attention_rows, tokens, Activation::none, stream, DType::float32, stream,
                 stream_stride);
        operand_fwd({DType::float32, stream, stream_stride, layer.norms[0].as<float>(), layer.norms[1].as<float>(),
                     eps_, DType::float32, stream, stream_stride, besides(layer.up.operand), tokens, hidden_},
                    threads);

        const DType fed_dtype = dtype_for(layer.down.operand);
        const int64_t fed_row = row_bytes(inner_ * size_of(fed_dtype)), blocks = (tokens + fed - 1) / fed;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * tokens / blocks, count = (block + 1) * tokens / blocks - first;
            OperandRows rows = rows_for(layer.up.operand);
            rows.data = static_cast<char*>(rows.data) + first * rows.stride;
            if (layer.up.operand == Operand::int8) rows.scale += first, rows.zero += first;
            multiply(layer.up, rows, count, activation_, nullptr, fed_dtype, activated, fed_row / size_of(fed_dtype));
            rows = {layer.down.operand, activated, fed_row, nullptr, nullptr};
            if (layer.down.operand == Operand::int8) {
                rows = {Operand::int8, quantised, row_bytes(inner_), fed_scale, fed_zero};
                operand_fwd({fed_dtype, activated, fed_row / 2, nullptr, nullptr, 0, fed_dtype, nullptr, 0, rows, count, inner_},
                            threads);
            }
            float* const here = stream + first * stream_stride;
            multiply(layer.down, rows, count, Activation::none, here, DType::float32, here, stream_stride);
        }

        OperandOf norm = {DType::float32, stream, stream_stride, layer.norms[2].as<float>(), layer.norms[3].as<float>(),
                          eps_, DType::float32, stream, stream_stride, {}, tokens, hidden_};
        if (i + 1 < layers_.size()) {
            norm.rows_out = besides(layers_[i + 1].qkv.operand);
        } else {
            norm.out_dtype = dtype;
            norm.out = out;
            norm.out_stride = hidden_;
        }
        operand_fwd(norm, threads);
    }
}

void Encoder::run(DType dtype, const void* x, void* out, const int32_t* cu_seqlens, int64_t tokens, int64_t sequences,
                  int threads) const {
    const char* const from = static_cast<const char*>(x);
    char* const to = static_cast<char*>(out);
    const int64_t token_bytes = hidden_ * size_of(dtype);
    if (layers_.empty()) {
        std::memcpy(to, from, static_cast<size_t>(tokens * token_bytes));
        return;
    }
    // Groups of about the same size: a small last one would read all weights for a few tokens.
    const int64_t groups = (tokens + group_tokens - 1) / group_tokens;
    Workspace workspace = take();
    int64_t sequence = 0;
    for (int64_t group = 0; group < groups && sequence < sequences; ++group) {
        Borders borders = {{0}, cu_seqlens[sequence], 0};
        const int64_t end = (group + 1) * tokens / groups;
        do {
            ++sequence;
            borders.tokens = cu_seqlens[sequence] - borders.first_token;
            borders.cu_seqlens.push_back(static_cast<int32_t>(borders.tokens));
        } while (sequence < sequences && cu_seqlens[sequence] < end &&
                 (cu_seqlens[sequence] + cu_seqlens[sequence + 1]) / 2 <= end);
        if (group + 1 == groups)
            while (sequence < sequences) {
                ++sequence;
                borders.tokens = cu_seqlens[sequence] - borders.first_token;
                borders.cu_seqlens.push_back(static_cast<int32_t>(borders.tokens));
            }
        if (borders.tokens > 0)
            run_group(dtype, from + borders.first_token * token_bytes, to + borders.first_token * token_bytes, borders,
                      workspace, threads);
    }
    give_back(std::move(workspace));
}

}  // namespace bertfast
