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

// One group's way through the layers: where its tensors are, and the steps.
class Encoder::Pass {
public:
    Pass(const Encoder& encoder, const Group& group, Workspace& workspace, int threads)
        : encoder_(encoder), group_(group), threads_(threads), tokens_(group.tokens()), hidden_(encoder.hidden_),
          inner_(encoder.inner_), fed_(std::min(tokens_, feed_forward_rows)), stream_row_(row_bytes(4 * hidden_)) {
        const auto& rows = encoder.rows_;
        // QKV is done with before the feed-forward block begins.
        const int64_t shared = std::max(tokens_ * rows.qkv, fed_ * (rows.activated + rows.quantised));
        const int64_t each = stream_row_ + rows.rounded + rows.context + 8;
        workspace.begin(tokens_ * each + shared + 8 * fed_ + 16 * line);
        stream_ = workspace.take<float>(tokens_ * stream_row_);
        rounded_ = workspace.take<char>(tokens_ * rows.rounded);
        context_ = workspace.take<char>(tokens_ * rows.context);
        qkv_ = workspace.take<char>(shared);
        activated_ = qkv_;
        quantised_ = activated_ + fed_ * rows.activated;
        scale_ = workspace.take<float>(4 * tokens_);
        zero_ = workspace.take<int32_t>(4 * tokens_);
        fed_scale_ = workspace.take<float>(4 * fed_);
        fed_zero_ = workspace.take<int32_t>(4 * fed_);
    }

    void begin(DType dtype, const char* x, Operand next) {
        operand_fwd({dtype, x, hidden_, nullptr, nullptr, 0, DType::float32, stream_, stream_stride(), besides(next),
                     tokens_, hidden_},
                    threads_);
    }

    // stream += Attention(stream) W + b
    void attend(const EncoderLayer& layer) {
        const DType dtype = dtype_for(layer.attention.operand);
        const int64_t row = row_bytes(hidden_ * size_of(dtype)), head_size = hidden_ / encoder_.heads_;
        multiply(layer.qkv, rows_for(layer.qkv.operand), tokens_, 3 * hidden_, hidden_, Activation::none, nullptr, dtype,
                 qkv_, 3 * hidden_);
        // The rows end within a word: what a GEMM reads beyond them meets weights of 0, and must be a number.
        if (hidden_ % 2) std::memset(context_, 0, static_cast<size_t>(tokens_ * row));
        varlen_attention_fwd({dtype, qkv_, 3 * hidden_, hidden_, head_size, group_.cu_seqlens.data(), context_, nullptr,
                              tokens_, group_.sequences(), encoder_.heads_, head_size, layer.scale, {},
                              row / size_of(dtype)},
                             threads_);
        OperandRows rows = {layer.attention.operand, context_, row, nullptr, nullptr};
        if (layer.attention.operand == Operand::int8) {
            rows = rows_for(Operand::int8);
            quantise(dtype, context_, row, rows, tokens_, hidden_);
        }
        multiply(layer.attention, rows, tokens_, hidden_, hidden_, Activation::none, stream_, DType::float32, stream_,
                 stream_stride());
    }

    // stream += GELU(stream W1 + b1) W2 + b2, some rows at a time.
    void feed_forward(const EncoderLayer& layer) {
        const DType dtype = dtype_for(layer.down.operand);
        const int64_t row = row_bytes(inner_ * size_of(dtype)), blocks = (tokens_ + fed_ - 1) / fed_;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * tokens_ / blocks, count = (block + 1) * tokens_ / blocks - first;
            OperandRows rows = rows_for(layer.up.operand);
            rows.data = static_cast<char*>(rows.data) + first * rows.stride;
            if (layer.up.operand == Operand::int8) rows.scale += first, rows.zero += first;
            if (inner_ % 2) std::memset(activated_, 0, static_cast<size_t>(count * row));  // as in attend
            multiply(layer.up, rows, count, inner_, hidden_, encoder_.activation_, nullptr, dtype, activated_,
                     row / size_of(dtype));
            rows = {layer.down.operand, activated_, row, nullptr, nullptr};
            if (layer.down.operand == Operand::int8) {
                rows = {Operand::int8, quantised_, row_bytes(inner_), fed_scale_, fed_zero_};
                quantise(dtype, activated_, row, rows, count, inner_);
            }
            float* const here = stream_ + first * stream_stride();
            multiply(layer.down, rows, count, hidden_, inner_, Activation::none, here, DType::float32, here,
                     stream_stride());
        }
    }

    // stream = LN(stream), and the operand of the next GEMM.
    void normalise(const float* weight, const float* bias, Operand next) {
        operand_fwd({DType::float32, stream_, stream_stride(), weight, bias, encoder_.eps_, DType::float32, stream_,
                     stream_stride(), besides(next), tokens_, hidden_},
                    threads_);
    }

    // out = LN(stream)
    void end(const float* weight, const float* bias, DType dtype, char* out) {
        operand_fwd({DType::float32, stream_, stream_stride(), weight, bias, encoder_.eps_, dtype, out, hidden_, {},
                     tokens_, hidden_},
                    threads_);
    }

private:
    int64_t stream_stride() const { return stream_row_ / 4; }

    // The stream as a GEMM's operand, and what operand_fwd has to write for that.
    OperandRows rows_for(Operand operand) const {
        if (operand == Operand::float32) return {operand, stream_, stream_row_, nullptr, nullptr};
        return {operand, rounded_, row_bytes(4 * hidden_ / elements_in_word(operand)), scale_, zero_};
    }
    OperandRows besides(Operand operand) const {
        return operand == Operand::float32 ? OperandRows{} : rows_for(operand);
    }

    void quantise(DType dtype, const char* x, int64_t row, const OperandRows& rows, int64_t count, int64_t cols) {
        operand_fwd({dtype, x, row / size_of(dtype), nullptr, nullptr, 0, dtype, nullptr, 0, rows, count, cols},
                    threads_);
    }

    void multiply(const PackedLinear& linear, const OperandRows& rows, int64_t count, int64_t cols, int64_t depth,
                  Activation activation, const float* residual, DType dtype, void* out, int64_t stride) {
        gemm_fwd({rows, linear.weight, linear.scale, linear.sums, linear.bias, activation, residual, stream_stride(),
                  dtype, out, stride, count, cols, depth},
                 threads_);
    }

    const Encoder& encoder_;
    const Group& group_;
    const int threads_;
    const int64_t tokens_, hidden_, inner_, fed_, stream_row_;
    float* stream_;                                            // the residual stream
    char* rounded_;                                            // the same as an operand that is not float32
    char *context_, *qkv_, *activated_, *quantised_;
    float *scale_, *fed_scale_;
    int32_t *zero_, *fed_zero_;
};

void Encoder::run_group(DType dtype, const char* x, char* out, const Group& group, Workspace& workspace,
                        int threads) const {
    Pass pass(*this, group, workspace, threads);
    pass.begin(dtype, x, layers_.front().qkv.operand);
    for (size_t i = 0; i < layers_.size(); ++i) {
        const EncoderLayer& layer = layers_[i];
        pass.attend(layer);
        pass.normalise(layer.norms[0], layer.norms[1], layer.up.operand);
        pass.feed_forward(layer);
        if (i + 1 < layers_.size())
            pass.normalise(layer.norms[2], layer.norms[3], layers_[i + 1].qkv.operand);
        else
            pass.end(layer.norms[2], layer.norms[3], dtype, out);
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
