// residual_layer_norm: out = LayerNorm(dropout(x + x_bias) + residual), and its gradients. Memory bound: each
// row is read once and written once. See layer_norm.h.
#include "column_sums.h"
#include "dropout.h"
#include "kernels.h"
#include "layer_norm.h"
#include "parallel.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int z_slot = 1, multiplier_slot = 2;

// Fills z = dropout(x + x_bias) + residual and, where there is dropout, the row's multipliers. Returns sum(z).
template <class T>
BERTFAST_INLINE float residual_row(const ResidualLayerNorm& p, int64_t row, float* z, float* multiplier) {
    const T* const x = static_cast<const T*>(p.x) + row * p.cols;
    const T* const x_bias = static_cast<const T*>(p.x_bias);
    const T* const residual = static_cast<const T*>(p.residual) + row * p.cols;
    if (p.dropout.threshold) dropout_row(p.dropout, row, multiplier, p.cols);
    Vec sum = {};
    for_columns(p.cols, [&](int64_t j, auto n) {
        Vec v = load(x + j, n);
        if (x_bias) v += load(x_bias + j, n);
        if (p.dropout.threshold) v *= load(multiplier + j, n);
        v += load(residual + j, n);
        store(z + j, v);
        sum += v;
    });
    return reduce_add(sum);
}

template <class T>
void forward(const ResidualLayerNorm& p, int threads) {
    const T* const weight = static_cast<const T*>(p.weight);
    const T* const bias = static_cast<const T*>(p.bias);
    parallel_rows(p.rows, p.cols, threads, [&](int64_t begin, int64_t end) {
        float* const z = scratch<float>(z_slot, padded(p.cols));
        float* const multiplier = scratch<float>(multiplier_slot, padded(p.cols));
        for (int64_t row = begin; row < end; ++row) {
            const float sum = residual_row<T>(p, row, z, multiplier);
            const Statistics s = statistics(z, sum, p.cols, p.eps);
            if (p.mean) p.mean[row] = s.mean;
            if (p.rstd) p.rstd[row] = s.rstd;
            T* const out = static_cast<T*>(p.out) + row * p.cols;
            for_columns(p.cols, [&](int64_t j, auto n) {
                const Vec xhat = (load(z + j) - s.mean) * s.rstd;
                store(out + j, fma(xhat, load(weight + j, n), load(bias + j, n)), n);
            });
        }
    });
}

template <class T>
void backward(const ResidualLayerNormBackward& b, int threads) {
    const ResidualLayerNorm& p = b.forward;
    const T* const weight = static_cast<const T*>(p.weight);
    const int64_t stride = padded(p.cols);
    void* const outputs[] = {b.dweight, b.dbias, b.dx_bias};
    column_sums<T>(p.rows, p.cols, threads, 3, outputs, [&](int64_t row, float* sums) {
        float* const z = scratch<float>(z_slot, stride);
        float* const multiplier = scratch<float>(multiplier_slot, stride);
        float* const dx_bias = sums + 2 * stride;
        const T* const dout = static_cast<const T*>(b.dout) + row * p.cols;
        T* const dresidual = static_cast<T*>(b.dresidual) + row * p.cols;
        T* const dx = b.dx ? static_cast<T*>(b.dx) + row * p.cols : nullptr;
        residual_row<T>(p, row, z, multiplier);
        layer_norm_backward(
            z, {p.mean[row], p.rstd[row]}, weight, sums, sums + stride, p.cols,
            [&](int64_t j, auto n) { return load(dout + j, n); },
            [&](int64_t j, Vec dz, auto n) {
                store(dresidual + j, dz, n);
                if (p.dropout.threshold) dz *= load(multiplier + j, n);
                if (dx) store(dx + j, dz, n);
                store(dx_bias + j, load(dx_bias + j) + keep(dz, n));
            });
    });
}

}  // namespace

void residual_layer_norm_fwd(const ResidualLayerNorm& p, int threads) {
    p.dtype == DType::float32 ? forward<float>(p, threads) : forward<bfloat16>(p, threads);
}

void residual_layer_norm_bwd(const ResidualLayerNormBackward& b, int threads) {
    b.forward.dtype == DType::float32 ? backward<float>(b, threads) : backward<bfloat16>(b, threads);
}

}  // namespace bertfast::BERTFAST_ISA
