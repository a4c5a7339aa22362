// residual_layer_norm: out = LayerNorm(dropout(x + x_bias) + residual), and its gradients.
#include "dropout.cuh"
#include "layer_norm.cuh"

namespace bertfast {
namespace {

// The rows that are normalised. In the backward they are made again, and a row's gradient is that of the residual and,
// through the dropout, that of x.
template <class T, bool is_aligned, bool drops>
struct Residual {
    static constexpr int sums = 3;  // the third is x_bias's
    using Piece = Slice<T, is_aligned>;
    const T *x, *x_bias, *residual;
    const int64_t* seed;
    uint32_t threshold;
    T *dx, *dresidual;

    struct Kept {
        typename Piece::Loaded x_bias;
        Drawn dropout;
    };
    __device__ Kept keep(const Piece& slice) const {
        Kept kept = {};
        if (x_bias) kept.x_bias = slice.load(x_bias);
        if (drops) kept.dropout = {*seed, threshold};
        return kept;
    }

    struct Loaded {
        typename Piece::Loaded x, residual;
    };
    __device__ Loaded load(const Piece& slice, int64_t row, bool exists) const {
        if (!exists) return {};
        return {slice.load(x + row * slice.cols), slice.load(residual + row * slice.cols)};
    }

    __device__ uint32_t values(const Piece& slice, int64_t row, const Kept& kept, const Loaded& loaded,
                               float (&y)[held]) const {
        float b[held], r[held];
        slice.widen(loaded.x, y);
        slice.widen(kept.x_bias, b);  // zeros where there is none
        slice.widen(loaded.residual, r);
#pragma unroll
        for (int e = 0; e < held; ++e) y[e] += b[e];
        uint32_t bits = 0;
        if constexpr (drops) {
            bits = kept.dropout.kept(slice, row);
            kept.dropout.apply(bits, y);
        }
#pragma unroll
        for (int e = 0; e < held; ++e) y[e] += r[e];
        return bits;
    }

    __device__ void finish(const Kept&, uint32_t, float (&)[held]) const {}
    __device__ void incoming(const Kept&, uint32_t, float (&)[held]) const {}

    // dy becomes the gradient of x, which is what x_bias's adds up.
    __device__ void store(const Piece& slice, int64_t row, const Kept& kept, uint32_t bits, float (&dy)[held]) const {
        slice.store(dresidual + row * slice.cols, dy);
        if constexpr (drops) {
            kept.dropout.apply(bits, dy);
            slice.store(dx + row * slice.cols, dy);
        }
    }
};

template <class T, bool is_aligned, bool drops>
Residual<T, is_aligned, drops> rows_of(const ResidualLayerNorm& p, void* dx = nullptr, void* dresidual = nullptr) {
    return {static_cast<const T*>(p.x),
            static_cast<const T*>(p.x_bias),
            static_cast<const T*>(p.residual),
            p.dropout.seed,
            p.dropout.threshold,
            static_cast<T*>(dx),
            static_cast<T*>(dresidual)};
}

template <class T>
Norm<T> norm_of(const ResidualLayerNorm& p) {
    return {static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), p.mean, p.rstd, p.rows,
            static_cast<int>(p.cols), p.eps};
}

template <class T, bool drops>
void forward(const ResidualLayerNorm& p, cudaStream_t stream) {
    if (p.cols > widest)
        launch_wide_forward(rows_of<T, false, drops>(p), norm_of<T>(p), p.out, stream);
    else if (aligned<T>(p.cols, p.x, p.x_bias, p.residual, p.weight, p.bias, p.out))
        launch_forward<T, true>(rows_of<T, true, drops>(p), norm_of<T>(p), p.out, stream);
    else
        launch_forward<T, false>(rows_of<T, false, drops>(p), norm_of<T>(p), p.out, stream);
}

template <class T, bool drops>
void backward(const ResidualLayerNormBackward& b, cudaStream_t stream) {
    const ResidualLayerNorm& p = b.forward;
    if (p.cols > widest)
        launch_wide_backward(rows_of<T, false, drops>(p, b.dx, b.dresidual), norm_of<T>(p), b.dout, b.workspace,
                             stream);
    else if (aligned<T>(p.cols, p.x, p.x_bias, p.residual, p.weight, b.dout, b.dx, b.dresidual))
        launch_backward<T, true>(rows_of<T, true, drops>(p, b.dx, b.dresidual), norm_of<T>(p), b.dout, b.workspace,
                                 stream);
    else
        launch_backward<T, false>(rows_of<T, false, drops>(p, b.dx, b.dresidual), norm_of<T>(p), b.dout, b.workspace,
                                  stream);
}

template <class T>
void forward_in(const ResidualLayerNorm& p, cudaStream_t stream) {
    if (p.rows == 0 || p.cols == 0) return;
    p.dropout.seed ? forward<T, true>(p, stream) : forward<T, false>(p, stream);
    check_launch("residual_layer_norm_fwd", p.dtype, {p.rows, p.cols});
}

template <class T>
void backward_in(const ResidualLayerNormBackward& b, cudaStream_t stream) {
    const ResidualLayerNorm& p = b.forward;
    if (p.cols == 0) return;
    if (p.rows != 0) {
        p.dropout.seed ? backward<T, true>(b, stream) : backward<T, false>(b, stream);
        check_launch("residual_layer_norm_bwd", p.dtype, {p.rows, p.cols});
    }
    add_chunks<T>(b.workspace, p.rows, p.cols, stream, b.dweight, b.dbias, b.dx_bias);
    check_launch("residual_layer_norm_bwd", p.dtype, {p.rows, p.cols});
}

}  // namespace

void residual_layer_norm_fwd(const ResidualLayerNorm& p, Stream stream) {
    const auto forward = p.dtype == DType::float32    ? forward_in<float>
                         : p.dtype == DType::bfloat16 ? forward_in<__nv_bfloat16>
                                                      : forward_in<__half>;
    forward(p, static_cast<cudaStream_t>(stream));
}

void residual_layer_norm_bwd(const ResidualLayerNormBackward& b, Stream stream) {
    const auto backward = b.forward.dtype == DType::float32    ? backward_in<float>
                          : b.forward.dtype == DType::bfloat16 ? backward_in<__nv_bfloat16>
                                                               : backward_in<__half>;
    backward(b, static_cast<cudaStream_t>(stream));
}

}  // namespace bertfast
