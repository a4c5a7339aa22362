// bias_gelu: out = GELU(x + bias), and its gradients.
//
// erf form:  GELU(u) = u Phi(u),               GELU'(u) = Phi(u) + u phi(u).
// tanh form: GELU(u) = u s, s = sigmoid(v(u)), GELU'(u) = s + u s (1 - s) v'(u), v(u) = u (a + b u^2).
//
// Both have to keep up with the memory, which leaves about 25 instructions for an element of two bytes: hence one
// exponential and one reciprocal of the special function units for each, and no branches.
#include "columns.cuh"

namespace bertfast {
namespace {

// Everything is computed from a = |u|, by symmetry: GELU(u) = max(u, 0) - a tail(a) and GELU'(-a) = tail(a) - a phi(a)
// = 1 - GELU'(a), with the tail of the normal distribution, 1 - Phi(a) = exp(-a^2 / 2) p(1 / (1 + k a)), which keeps
// its relative precision where 1 + erf would cancel. The polynomial p is fitted for the least relative error: 1.7e-7
// for float32, 1.9e-5 for half precision, whose own rounding is 13 times that.
template <class T>
struct ErfForm {
    struct Tail {
        float a, p, exponential;  // |u|, and the factors of the tail
    };
    __device__ static Tail tail(float u) {
        const float a = smaller(fabsf(u), 20.0f);  // the exponential is 0 there, and infinity times it would be NaN
        const float exponential = exp2_approx(a * a * -0.721347520f);  // log2(e) / 2
        float p;
        if constexpr (sizeof(T) == 4) {
            const float t = reciprocal_approx(fmaf(a, 0.31f, 1.0f));
            p = fmaf(0.0358403623f, t, -0.141599298f);
            p = fmaf(p, t, 0.155059502f);
            p = fmaf(p, t, -0.0148964515f);
            p = fmaf(p, t, 0.110106871f);
            p = fmaf(p, t, 0.107771963f);
            p = fmaf(p, t, 0.124060221f);
            p = fmaf(p, t, 0.123656914f) * t;
        } else {
            const float t = reciprocal_approx(fmaf(a, 0.37f, 1.0f));
            p = fmaf(-0.0930249397f, t, 0.216123811f);
            p = fmaf(p, t, 0.0711042254f);
            p = fmaf(p, t, 0.159062278f);
            p = fmaf(p, t, 0.146725338f) * t;
        }
        return {a, p, exponential};
    }
    __device__ static float value(float u) {
        const Tail n = tail(u);
        return fmaf(-n.a * n.p, n.exponential, larger(u, 0.0f));
    }
    __device__ static float derivative(float u) {
        const Tail n = tail(u);
        const float left = fmaf(n.a, -0.398942280f, n.p) * n.exponential;  // 1 / sqrt(2 pi)
        return u < 0.0f ? left : 1.0f - left;
    }
};

// (1 + tanh y) / 2 = sigmoid(2 y) = 1 / (1 + exp(-2 y)), without the cancellation of the left side for negative y.
template <class T>
struct TanhForm {
    static constexpr float a = 1.59576912f, b = 0.0713548163f;  // 2 sqrt(2 / pi), and 0.044715 times that
    static constexpr float log2_e = 1.44269504f;
    __device__ static float exponential(float u) {
        return exp2_approx(u * fmaf(u * u, -b * log2_e, -a * log2_e));
    }
    __device__ static float value(float u) { return u * reciprocal_approx(1.0f + exponential(u)); }
    __device__ static float derivative(float u) {
        // Beyond 10 the sigmoid is 0 or 1 in any precision, and u^2 must not overflow.
        u = larger(smaller(u, 10.0f), -10.0f);
        const float e = exponential(u), s = reciprocal_approx(1.0f + e);
        return fmaf(u * (s * e) * s, fmaf(u * u, 3 * b, a), s);  // s e = 1 - s
    }
};

template <class T, class Form, bool is_aligned>
__global__ void __launch_bounds__(lanes * warps, 4)
    forward_kernel(const T* x, const T* bias, T* out, int64_t rows, int64_t cols, int64_t chunk) {
    constexpr int ahead = is_aligned ? 4 : 1, count = per_thread<T>;  // rows whose loads are on their way at once
    wait_for_predecessors();
    start_dependents();
    const Columns<T, is_aligned> columns(cols);
    if (!columns.has(0)) return;
    float b[count] = {};
    if (bias) columns.widen(columns.load(bias), b);
    const auto [begin, end] = Rows(rows, chunk);
    for (int64_t row = begin + threadIdx.y; row < end; row += warps * ahead) {
        typename Columns<T, is_aligned>::Loaded loaded[ahead];
#pragma unroll
        for (int k = 0; k < ahead; ++k)
            if (row + k * warps < end) loaded[k] = columns.load(x + (row + k * warps) * cols);
#pragma unroll
        for (int k = 0; k < ahead; ++k) {
            if (row + k * warps >= end) break;
            float u[count];
            columns.widen(loaded[k], u);
            for (int i = 0; i < count; ++i) u[i] = Form::value(u[i] + b[i]);
            columns.store(out + (row + k * warps) * cols, u);
        }
    }
}

template <class T, class Form, bool is_aligned>
__global__ void __launch_bounds__(lanes * warps, 4)
    backward_kernel(const T* dout, const T* x, const T* bias, T* dx, float* workspace, int64_t rows, int64_t cols,
                    int64_t chunk) {
    constexpr int ahead = is_aligned ? 2 : 1, count = per_thread<T>;
    wait_for_predecessors();
    start_dependents();
    const Columns<T, is_aligned> columns(cols);
    float b[count] = {}, sums[count] = {};
    if (bias && columns.has(0)) columns.widen(columns.load(bias), b);
    const auto [begin, end] = Rows(rows, chunk);
    for (int64_t row = begin + threadIdx.y; columns.has(0) && row < end; row += warps * ahead) {
        typename Columns<T, is_aligned>::Loaded loaded_x[ahead], loaded_dout[ahead];
#pragma unroll
        for (int k = 0; k < ahead; ++k) {
            if (row + k * warps >= end) break;
            loaded_x[k] = columns.load(x + (row + k * warps) * cols);
            loaded_dout[k] = columns.load(dout + (row + k * warps) * cols);
        }
#pragma unroll
        for (int k = 0; k < ahead; ++k) {
            if (row + k * warps >= end) break;
            float u[count], g[count];
            columns.widen(loaded_x[k], u);
            columns.widen(loaded_dout[k], g);
            for (int i = 0; i < count; ++i) {
                g[i] *= Form::derivative(u[i] + b[i]);
                sums[i] += g[i];
            }
            columns.store(dx + (row + k * warps) * cols, g);
        }
    }
    if (workspace) store_chunk(columns, sums, workspace);
}

template <class T, class Form>
void forward(const BiasGelu& p, cudaStream_t stream) {
    const auto kernel =
        aligned<T>(p.cols, p.x, p.bias, p.out) ? forward_kernel<T, Form, true> : forward_kernel<T, Form, false>;
    launch(kernel, grid<T>(p.rows, p.cols), block(), 0, stream, static_cast<const T*>(p.x),
           static_cast<const T*>(p.bias), static_cast<T*>(p.out), p.rows, p.cols, chunk_length(p.rows));
}

template <class T, class Form>
void backward(const BiasGeluBackward& b, cudaStream_t stream) {
    const BiasGelu& p = b.forward;
    const auto kernel = aligned<T>(p.cols, p.x, p.bias, b.dout, b.dx) ? backward_kernel<T, Form, true>
                                                                      : backward_kernel<T, Form, false>;
    launch(kernel, grid<T>(p.rows, p.cols), block(), 0, stream, static_cast<const T*>(b.dout),
           static_cast<const T*>(p.x), static_cast<const T*>(p.bias), static_cast<T*>(b.dx), b.workspace, p.rows,
           p.cols, chunk_length(p.rows));
}

template <class T>
void forward_in(const BiasGelu& p, cudaStream_t stream) {
    if (p.rows == 0 || p.cols == 0) return;
    p.tanh_form ? forward<T, TanhForm<T>>(p, stream) : forward<T, ErfForm<T>>(p, stream);
    check_launch("bias_gelu_fwd", p.dtype, {p.rows, p.cols});
}

template <class T>
void backward_in(const BiasGeluBackward& b, cudaStream_t stream) {
    const BiasGelu& p = b.forward;
    if (p.rows != 0 && p.cols != 0) {
        p.tanh_form ? backward<T, TanhForm<T>>(b, stream) : backward<T, ErfForm<T>>(b, stream);
        check_launch("bias_gelu_bwd", p.dtype, {p.rows, p.cols});
    }
    if (b.dbias && p.cols != 0) {
        add_chunks<T>(b.workspace, p.rows, p.cols, stream, b.dbias);
        check_launch("bias_gelu_bwd", p.dtype, {p.rows, p.cols});
    }
}

}  // namespace

void bias_gelu_fwd(const BiasGelu& p, Stream stream) {
    const auto forward = p.dtype == DType::float32    ? forward_in<float>
                         : p.dtype == DType::bfloat16 ? forward_in<__nv_bfloat16>
                                                      : forward_in<__half>;
    forward(p, static_cast<cudaStream_t>(stream));
}

void bias_gelu_bwd(const BiasGeluBackward& b, Stream stream) {
    const auto backward = b.forward.dtype == DType::float32    ? backward_in<float>
                          : b.forward.dtype == DType::bfloat16 ? backward_in<__nv_bfloat16>
                                                               : backward_in<__half>;
    backward(b, static_cast<cudaStream_t>(stream));
}

}  // namespace bertfast
