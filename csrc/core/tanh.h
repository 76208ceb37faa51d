// The hyperbolic tangent, by the exponential of core/philox.h: operations in a written order, so
// host, device and every instruction set give the same bits.
#pragma once
#include "core/philox.h"

namespace specrt {

// Below the root of this 1 - 2 / (e^2x + 1) would lose digits, and a series serves.
constexpr float kTanhSeriesEnd = 0.390625f;  // of x^2
// Coefficients of the powers of x (Cephes, tanhf.c); one by one, as a device knows no array of a
// header's.
constexpr float kTanh3 = -3.33332819422e-1f, kTanh5 = 1.33314422036e-1f,
                kTanh7 = -5.37397155531e-2f, kTanh9 = 2.06390887954e-2f,
                kTanh11 = -5.70498872745e-3f;

// tanh(x) within 3 ulp; NaN for NaN. The lanes' tanh of core/tanh_lanes.h takes the same steps.
SPECRT_HD float tanh_of(float x) {
    const float x2 = x * x;
    if (!(x2 < kTanhSeriesEnd)) return 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f);
    float series = fused_mul_add(kTanh11, x2, kTanh9);
    series = fused_mul_add(series, x2, kTanh7);
    series = fused_mul_add(series, x2, kTanh5);
    series = fused_mul_add(series, x2, kTanh3);
    return fused_mul_add(x * x2, series, x);
}

}  // namespace specrt
