// The activations of an MLP, by the exponential of core/philox.h: operations in a written order, so
// host, device and every instruction set give the same bits. (silu is not here: on a GPU it takes
// CUDA's exponential, core/silu.cuh.)
#pragma once
#include "core/philox.h"

namespace specrt {

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

template <Activation kActivation>
struct Activated {
    static constexpr Activation kKind = kActivation;
};

// Calls f with an Activated of the kind that `activation` names.
template <typename F>
inline void with_activation(Activation activation, F&& f) {
    switch (activation) {
        case Activation::kSilu:
            return f(Activated<Activation::kSilu>{});
        case Activation::kGelu:
            return f(Activated<Activation::kGelu>{});
        case Activation::kGeluTanh:
            return f(Activated<Activation::kGeluTanh>{});
        case Activation::kRelu:
            return f(Activated<Activation::kRelu>{});
        case Activation::kRelu2:
            return f(Activated<Activation::kRelu2>{});
    }
}

// gelu(x) = x Phi(x) = max(x, 0) - t Q(t), where t = |x| and Q is the normal law's upper tail,
// which keeps its digits however small it is; 1 + erf would lose them. Q(t) = exp(-t^2 / 2) u P(u),
// where u = 1 / (1 + 0.35 t), within 4e-8 for t <= 14; e^x of what comes beyond is 0.
constexpr float kGeluEnd = 14.0f, kGeluStep = 0.35f;
// Coefficients of P, by the power of u: least largest relative error on [0, 14], fitted in float64.
// One by one, as a device knows no array of a header's.
constexpr float kGelu0 = 1.3962140070e-1f, kGelu1 = 1.3986188894e-1f, kGelu2 = 1.1983270554e-1f,
                kGelu3 = 1.0550865230e-1f, kGelu4 = -2.3111393010e-2f, kGelu5 = 1.5917646634e-1f,
                kGelu6 = -2.5571628852e-1f, kGelu7 = 1.4397268555e-1f, kGelu8 = -2.9146133815e-2f;

// -2 sqrt(2 / pi), and times 0.044715: 1 + tanh(y) = 2 / (1 + exp(-2 y)).
constexpr float kGeluTanhSlope = -1.5957691216f, kGeluTanhCube = -7.1354816273e-2f;

SPECRT_HD float relu_of(float x) {
    return 0.0f > x ? 0.0f : x;  // NaN for NaN
}

// Within 4 ulp of x Phi(x) where that is a normal number.
SPECRT_HD float gelu_of(float x) {
    const float size = x > -x ? x : -x, t = kGeluEnd < size ? kGeluEnd : size;
    const float square = t * t, rest = fused_mul_add(t, t, -square);
    float tail = exp_of(-0.5f * square);
    tail = fused_mul_add(tail, -0.5f * rest, tail);
    const float u = 1.0f / fused_mul_add(t, kGeluStep, 1.0f);
    float series = fused_mul_add(kGelu8, u, kGelu7);
    series = fused_mul_add(series, u, kGelu6);
    series = fused_mul_add(series, u, kGelu5);
    series = fused_mul_add(series, u, kGelu4);
    series = fused_mul_add(series, u, kGelu3);
    series = fused_mul_add(series, u, kGelu2);
    series = fused_mul_add(series, u, kGelu1);
    series = fused_mul_add(series, u, kGelu0);
    return relu_of(x) - t * (tail * (series * u));
}

SPECRT_HD float gelu_tanh_of(float x) {
    const float slope = fused_mul_add(x * x, kGeluTanhCube, kGeluTanhSlope);
    return x / (1.0f + exp_of(x * slope));
}

}  // namespace specrt
