// The hyperbolic tangent, by the exponential of core/philox.h: operations in a written order, so
// host, device and every instruction set give the same bits.
#pragma once
#include "core/philox.h"

namespace specrt {

// Below the root of this 1 - 2 / (e^2x + 1) would lose digits, and a series serves.
constexpr float kTanhSeriesEnd = 0.390625f;  // of x^2
// Of (tanh(x) / x - 1) / x^2 in x^2, the highest power first (Cephes, tanhf.c).
constexpr float kTanhSeries[5] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                  1.33314422036e-1f, -3.33332819422e-1f};

// tanh(x) within 3 ulp; NaN for NaN. The lanes' tanh of core/tanh_lanes.h takes the same steps.
SPECRT_HD float tanh_of(float x) {
    const float x2 = x * x;
    if (!(x2 < kTanhSeriesEnd)) return 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f);
    float series = fused_mul_add(kTanhSeries[0], x2, kTanhSeries[1]);
    series = fused_mul_add(series, x2, kTanhSeries[2]);
    series = fused_mul_add(series, x2, kTanhSeries[3]);
    series = fused_mul_add(series, x2, kTanhSeries[4]);
    return fused_mul_add(x * x2, series, x);
}

}  // namespace specrt
