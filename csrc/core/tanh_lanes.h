// tanh_of of core/tanh.h, sixteen at a time: the very bits.
#pragma once
#include "core/simd.h"
#include "core/tanh.h"

namespace specrt::SPECRT_ISA {

inline V16 tanh(V16 x) {
    const V16 x2 = mul(x, x);
    V16 series = fma(splat(kTanh11), x2, splat(kTanh9));
    series = fma(series, x2, splat(kTanh7));
    series = fma(series, x2, splat(kTanh5));
    series = fma(series, x2, splat(kTanh3));
    const V16 small = fma(mul(x, x2), series, x);
    const V16 rest = div(splat(2.0f), add(exp(mul(splat(2.0f), x)), splat(1.0f)));
    return choose_less(x2, splat(kTanhSeriesEnd), small, sub(splat(1.0f), rest));
}

}  // namespace specrt::SPECRT_ISA
