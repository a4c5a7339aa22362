// See encoder.h. A call goes through the layers with groups of whole sequences of about `group_tokens` tokens, so that
// its memory does not grow with the batch and stays in the caches; weights are read anew for each group, which costs a
// few per cent of what computing it does. The residual stream and all statistics are float32, whatever the GEMMs
// multiply. Every step below is one loop over PyTorch's OpenMP threads.
#include "encoder.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

namespace bertfast {
namespace {

constexpr int64_t line = 64, group_tokens = 2048, feed_forward_rows = 512;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of an odd number of cache lines, so that the rows of a tile do not all fall into the same sets of the cache.
int64_t row_bytes(int64_t bytes) { return (round_up(bytes, line) / line | 1) * line; }

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// What goes into a GEMM before it is quantised.
DType dtype_for(Operand operand) { return operand == Operand::float32 ? DType::float32 : DType::bfloat16; }

}  // namespace

// A group's sequences: cu_seqlens from 0 on, and the token of the batch that it begins with.
struct Encoder::Group {
    int64_t first_token;
    std::vector<int32_t> cu_seqlens = {0};

    int64_t tokens() const { return cu_seqlens.back(); }
    int64_t sequences() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
};

// One call's memory, handed out in pieces that last until it is begun anew.
class Encoder::Workspace {
public:
    void begin(int64_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        size_ = 0;
        data_.reset();
        data_.reset(static_cast<char*>(std::aligned_alloc(line, static_cast<size_t>(round_up(bytes, line)))));
        if (!data_) throw std::bad_alloc();
        size_ = bytes;
    }
    template <class T>
    T* take(int64_t bytes) {
        T* const piece = reinterpret_cast<T*>(data_.get() + used_);
        used_ += round_up(bytes, line);
        return piece;
    }
    int64_t size() const { return size_; }

private:
    struct Free {
        void operator()(char* data) const { std::free(data); }
    };
    std::unique_ptr<char, Free> data_;
    int64_t size_ = 0, used_ = 0;
};

Encoder::Encoder(int64_t hidden, int64_t inner, int64_t heads, float eps, Activation activation,
                 std::vector<EncoderLayer> layers)
    : hidden_(hidden), inner_(inner), heads_(heads), eps_(eps), activation_(activation), layers_(std::move(layers)) {
    for (const EncoderLayer& layer : layers_) {
        for (Operand operand : {layer.qkv.operand, layer.up.operand})
            if (operand != Operand::float32)
                rows_.rounded = std::max(rows_.rounded, row_bytes(4 * hidden_ / elements_in_word(operand)));
        if (layer.attention.operand == Operand::int8) rows_.rounded = std::max(rows_.rounded, row_bytes(hidden_));
        const int64_t attended = size_of(dtype_for(layer.attention.operand));
        rows_.context = std::max(rows_.context, row_bytes(hidden_ * attended));
        rows_.qkv = std::max(rows_.qkv, 3 * hidden_ * attended);
        rows_.activated = std::max(rows_.activated, row_bytes(inner_ * size_of(dtype_for(layer.down.operand))));
        if (layer.down.operand == Operand::int8) rows_.quantised = row_bytes(inner_);
    }
}

Encoder::~Encoder() = default;

int64_t Encoder::workspace_bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t total = 0;
    for (const auto& workspace : free_) total += workspace->size();
    return total;
}

std::unique_ptr<Encoder::Workspace> Encoder::take() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Workspace>();
    std::unique_ptr<Workspace> workspace = std::move(free_.back());
    free_.pop_back();
    return workspace;
}

void Encoder::give_back(std::unique_ptr<Workspace> workspace) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(workspace));
}

void Encoder::run_group(DType dtype, const char* x, char* out, const Group& group, Workspace& workspace,
                        int threads) const {
    const int64_t tokens = group.tokens(), fed = std::min(tokens, feed_forward_rows);
    const int64_t hidden_row = row_bytes(4 * hidden_);
    // QKV is done with before the feed-forward block begins.
    const int64_t inner = std::max(tokens * rows_.qkv, fed * (rows_.activated + rows_.quantised));
    workspace.begin(tokens * (hidden_row + rows_.rounded + rows_.context) + inner + 8 * (tokens + fed) + 16 * line);
    float* const stream = workspace.take<float>(tokens * hidden_row);    // the residual stream
    char* const rounded = workspace.take<char>(tokens * rows_.rounded);  // the same as a GEMM's operand
    char* const context = workspace.take<char>(tokens * rows_.context);
    char* const qkv = workspace.take<char>(inner);
    char* const activated = qkv;
    char* const quantised = activated + fed * rows_.activated;
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
    const auto multiply = [&](const PackedLinear& linear, const OperandRows& rows, int64_t count, int64_t cols,
                              int64_t depth, Activation activation, const float* residual, DType out_dtype,
                              void* result, int64_t stride) {
        gemm_fwd({rows, linear.weight, linear.scale, linear.sums, linear.bias, activation, residual, stream_stride,
                  out_dtype, result, stride, count, cols, depth},
                 threads);
    };

    operand_fwd({dtype, x, hidden_, nullptr, nullptr, 0, DType::float32, stream, stream_stride,
                 besides(layers_.front().qkv.operand), tokens, hidden_},
                threads);
    for (size_t i = 0; i < layers_.size(); ++i) {
        const EncoderLayer& layer = layers_[i];

        const DType attended = dtype_for(layer.attention.operand);
        multiply(layer.qkv, rows_for(layer.qkv.operand), tokens, 3 * hidden_, hidden_, Activation::none, nullptr,
                 attended, qkv, 3 * hidden_);
        const int64_t context_row = row_bytes(hidden_ * size_of(attended)), head_size = hidden_ / heads_;
        // The rows end within a word: what a GEMM reads beyond them meets weights of 0, and must be a number.
        if (hidden_ % 2) std::memset(context, 0, static_cast<size_t>(tokens * context_row));
        varlen_attention_fwd({attended, qkv, 3 * hidden_, hidden_, head_size, group.cu_seqlens.data(), context, nullptr,
                              tokens, group.sequences(), heads_, head_size, layer.scale, {},
                              context_row / size_of(attended)},
                             threads);
        OperandRows attention_rows = {layer.attention.operand, context, context_row, nullptr, nullptr};
        if (layer.attention.operand == Operand::int8) {
            attention_rows = rows_for(Operand::int8);
            operand_fwd({attended, context, context_row / 2, nullptr, nullptr, 0, attended, nullptr, 0, attention_rows, tokens,
                         hidden_},
                        threads);
        }
        multiply(layer.attention, attention_rows, tokens, hidden_, hidden_, Activation::none, stream, DType::float32, stream,
                 stream_stride);
        operand_fwd({DType::float32, stream, stream_stride, layer.norms[0], layer.norms[1],
                     eps_, DType::float32, stream, stream_stride, besides(layer.up.operand), tokens, hidden_},
                    threads);

        const DType fed_dtype = dtype_for(layer.down.operand);
        const int64_t fed_row = row_bytes(inner_ * size_of(fed_dtype)), blocks = (tokens + fed - 1) / fed;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * tokens / blocks, count = (block + 1) * tokens / blocks - first;
            OperandRows rows = rows_for(layer.up.operand);
            rows.data = static_cast<char*>(rows.data) + first * rows.stride;
            if (layer.up.operand == Operand::int8) rows.scale += first, rows.zero += first;
            if (inner_ % 2) std::memset(activated, 0, static_cast<size_t>(count * fed_row));
            multiply(layer.up, rows, count, inner_, hidden_, activation_, nullptr, fed_dtype, activated, fed_row / size_of(fed_dtype));
            rows = {layer.down.operand, activated, fed_row, nullptr, nullptr};
            if (layer.down.operand == Operand::int8) {
                rows = {Operand::int8, quantised, row_bytes(inner_), fed_scale, fed_zero};
                operand_fwd({fed_dtype, activated, fed_row / 2, nullptr, nullptr, 0, fed_dtype, nullptr, 0, rows, count, inner_},
                            threads);
            }
            float* const here = stream + first * stream_stride;
            multiply(layer.down, rows, count, hidden_, inner_, Activation::none, here, DType::float32, here, stream_stride);
        }

        OperandOf norm = {DType::float32, stream, stream_stride, layer.norms[2], layer.norms[3],
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
    bool rising = sequences >= 0 && cu_seqlens[0] == 0 && cu_seqlens[sequences] == tokens;
    for (int64_t i = 0; rising && i < sequences; ++i) rising = cu_seqlens[i] <= cu_seqlens[i + 1];
    if (!rising) throw std::invalid_argument("cu_seqlens must rise from 0 to the number of tokens");
    const char* const from = static_cast<const char*>(x);
    char* const to = static_cast<char*>(out);
    const int64_t token_bytes = hidden_ * size_of(dtype);
    if (layers_.empty()) {
        std::memcpy(to, from, static_cast<size_t>(tokens * token_bytes));
        return;
    }
    // Groups of about the same size: a small last one would read all weights for a few tokens.
    const int64_t groups = (tokens + group_tokens - 1) / group_tokens;
    std::unique_ptr<Workspace> workspace = take();
    for (int64_t i = 0, sequence = 0; i < groups; ++i) {
        const int64_t end = (i + 1) * tokens / groups;
        Group group = {cu_seqlens[sequence]};
        // Up to the border that is nearest to the group's end, and at least one sequence.
        const auto belongs = [&] {
            const int64_t begins = cu_seqlens[sequence], ends = cu_seqlens[sequence + 1];
            return i + 1 == groups || begins + ends <= 2 * end || group.sequences() == 0;
        };
        while (sequence < sequences && belongs())
            group.cu_seqlens.push_back(static_cast<int32_t>(cu_seqlens[++sequence] - group.first_token));
        const int64_t offset = group.first_token * token_bytes;
        if (group.tokens() > 0) run_group(dtype, from + offset, to + offset, group, *workspace, threads);
    }
    give_back(std::move(workspace));
}

}  // namespace bertfast
