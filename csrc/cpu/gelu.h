// GELU of a vector, and its derivative: what gelu.cpp and the GEMM's epilogue share.
//
// erf form:  GELU(u) = u Phi(u),               GELU'(u) = Phi(u) + u phi(u).
// tanh form: GELU(u) = u s, s = sigmoid(v(u)), GELU'(u) = s + u s (1 - s) v'(u), v(u) = u (a + b u^2).
// The second is the tanh of the paper, (1 + tanh y) / 2 = sigmoid(2 y), without its cancellation for negative y.
#pragma once

#include "simd.h"

namespace bertfast::BERTFAST_ISA {

// 1 / x for normal x. The estimate has 14 bits, and a step of Newton's method doubles them.
BERTFAST_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    const Vec estimate = (Vec)_mm512_rcp14_ps((__m512)x);
    return estimate * fma(-x, estimate, splat(2.0f));
#else
    return 1.0f / x;
#endif
}

// The normal distribution's Phi(u) and exp(-u^2 / 2). The tail 1 - Phi(|u|) is exp(-u^2 / 2) p(1 / (1 + 0.31 |u|))
// with a polynomial p fitted for the least relative error (1.6e-7), so that Phi keeps its relative precision for
// negative u, where 1 + erf(u / sqrt 2) would cancel; and the backward needs the same exponential for phi.
struct Normal {
    Vec cumulative, exponential;
};
BERTFAST_INLINE Normal normal(Vec u) {
    const Vec exponential = exp2(u * u * -0.721347520f);  // log2(e) / 2
    const Vec t = reciprocal(fma(min(splat(20.0f), abs(u)), splat(0.31f), splat(1.0f)));
    Vec p = splat(0.0358403623f);
    p = fma(p, t, splat(-0.141599298f));
    p = fma(p, t, splat(0.155059502f));
    p = fma(p, t, splat(-0.0148964515f));
    p = fma(p, t, splat(0.110106871f));
    p = fma(p, t, splat(0.107771963f));
    p = fma(p, t, splat(0.124060221f));
    p = fma(p, t, splat(0.123656914f));
    const Vec tail = p * t * exponential;
    return {u < 0.0f ? tail : 1.0f - tail, exponential};
}

struct Both {
    Vec value, derivative;
};

struct ErfForm {
    BERTFAST_INLINE Vec value(Vec u) { return u * normal(u).cumulative; }
    BERTFAST_INLINE Both both(Vec u) {
        const Normal n = normal(u);
        return {u * n.cumulative, fma(u * 0.398942280f, n.exponential, n.cumulative)};  // 1 / sqrt(2 pi)
    }
};

struct TanhForm {
    static constexpr float a = 1.59576912f, b = 0.0713548163f;  // 2 sqrt(2 / pi), and 0.044715 times that
    BERTFAST_INLINE Vec sigmoid(Vec u) { return 1.0f / (1.0f + exp(-u * fma(u * u, splat(b), splat(a)))); }
    BERTFAST_INLINE Vec value(Vec u) { return u * sigmoid(u); }
    BERTFAST_INLINE Both both(Vec unbounded) {
        // s is 0 or 1 long before |u| = 20; beyond, u^2 would overflow, and 0 times infinity is no derivative.
        const Vec u = max(splat(-20.0f), min(splat(20.0f), unbounded));
        const Vec s = sigmoid(u);
        return {unbounded * s, fma(u * s * (1.0f - s), fma(u * u, splat(3 * b), splat(a)), s)};
    }
};

}  // namespace bertfast::BERTFAST_ISA
