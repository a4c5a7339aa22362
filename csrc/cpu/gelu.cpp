// bias_gelu: out = GELU(x + bias), and its gradients. See gelu.h for the arithmetic.
#include "column_sums.h"
#include "gelu.h"
#include "kernels.h"
#include "parallel.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <class T, class Form>
void forward(const BiasGelu& p, int threads) {
    const T* const bias = static_cast<const T*>(p.bias);
    parallel_rows(p.rows, p.cols, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* const x = static_cast<const T*>(p.x) + row * p.cols;
            T* const out = static_cast<T*>(p.out) + row * p.cols;
            for_columns(p.cols, [&](int64_t j, auto n) {
                const Vec u = bias ? load(x + j, n) + load(bias + j, n) : load(x + j, n);
                store(out + j, Form::value(u), n);
            });
        }
    });
}

template <class T, class Form>
void backward(const BiasGeluBackward& b, int threads) {
    const BiasGelu& p = b.forward;
    const T* const bias = static_cast<const T*>(p.bias);
    column_sums<T>(p.rows, p.cols, threads, 1, &b.dbias, [&](int64_t row, float* dbias) {
        const T* const x = static_cast<const T*>(p.x) + row * p.cols;
        const T* const dout = static_cast<const T*>(b.dout) + row * p.cols;
        T* const dx = static_cast<T*>(b.dx) + row * p.cols;
        T* const out = p.out ? static_cast<T*>(p.out) + row * p.cols : nullptr;
        for_columns(p.cols, [&](int64_t j, auto n) {
            const Vec u = bias ? load(x + j, n) + load(bias + j, n) : load(x + j, n);
            const Both gelu = Form::both(u);
            const Vec du = load(dout + j, n) * gelu.derivative;
            if (out) store(out + j, gelu.value, n);
            store(dx + j, du, n);
            store(dbias + j, load(dbias + j) + keep(du, n));
        });
    });
}

}  // namespace

void bias_gelu_fwd(const BiasGelu& p, int threads) {
    const bool wide = p.dtype == DType::float32;
    if (p.tanh_form)
        wide ? forward<float, TanhForm>(p, threads) : forward<bfloat16, TanhForm>(p, threads);
    else
        wide ? forward<float, ErfForm>(p, threads) : forward<bfloat16, ErfForm>(p, threads);
}

void bias_gelu_bwd(const BiasGeluBackward& b, int threads) {
    const bool wide = b.forward.dtype == DType::float32;
    if (b.forward.tanh_form)
        wide ? backward<float, TanhForm>(b, threads) : backward<bfloat16, TanhForm>(b, threads);
    else
        wide ? backward<float, ErfForm>(b, threads) : backward<bfloat16, ErfForm>(b, threads);
}

}  // namespace bertfast::BERTFAST_ISA
