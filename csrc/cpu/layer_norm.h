// LayerNorm of one row, forward and backward: what norm.cpp and embedding.cpp share.
//
// A row z is first built in a float32 scratch row, so that every input is read from memory once, and the further
// passes over it stay in the first-level cache. The scratch row is padded with zeros to whole vectors.
#pragma once

#include <cmath>

#include "simd.h"

namespace bertfast::BERTFAST_ISA {

BERTFAST_INLINE int64_t padded(int64_t columns) { return (columns + lanes - 1) / lanes * lanes; }

struct Statistics {
    float mean, rstd;
};

// mean = sum / columns, rstd = 1 / sqrt(mean((z - mean)^2) + eps). The variance takes a second pass, because
// E[z^2] - E[z]^2 cancels where the mean is large.
BERTFAST_INLINE Statistics statistics(const float* z, float sum, int64_t columns, float eps) {
    const float mean = sum / static_cast<float>(columns);
    Vec squares = {};
    for_columns(columns, [&](int64_t j, auto n) {
        const Vec centred = keep(load(z + j) - mean, n);
        squares = fma(centred, centred, squares);
    });
    return {mean, 1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(columns) + eps)};
}

// With xhat = (z - mean) rstd and g = dout weight:
//   dz = rstd (g - mean(g) - xhat mean(g xhat)),  dweight += dout xhat,  dbias += dout.
// z is overwritten. load_dout(j, n) gives dout, and is called twice; store_dz(j, dz, n) takes the result.
template <class T, class Load, class Store>
BERTFAST_INLINE void layer_norm_backward(float* z, Statistics s, const T* weight, float* dweight, float* dbias,
                                         int64_t columns, Load load_dout, Store store_dz) {
    Vec sum_g = {}, sum_gx = {};
    for_columns(columns, [&](int64_t j, auto n) {
        const Vec dout = load_dout(j, n), xhat = (load(z + j) - s.mean) * s.rstd;
        const Vec g = dout * load(weight + j, n);
        store(z + j, xhat);
        store(dweight + j, keep(fma(dout, xhat, load(dweight + j)), n));
        store(dbias + j, load(dbias + j) + dout);
        sum_g += g;
        sum_gx += keep(g * xhat, n);
    });
    const float mean_g = reduce_add(sum_g) / static_cast<float>(columns);
    const float mean_gx = reduce_add(sum_gx) / static_cast<float>(columns);
    for_columns(columns, [&](int64_t j, auto n) {
        const Vec g = load_dout(j, n) * load(weight + j, n);
        store_dz(j, (g - mean_g - load(z + j) * mean_gx) * s.rstd, n);
    });
}

}  // namespace bertfast::BERTFAST_ISA
