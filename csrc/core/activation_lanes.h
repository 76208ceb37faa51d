// The functions of core/activation.h, sixteen at a time: the very bits.
#pragma once
#include "core/activation.h"
#include "core/rows.h"

namespace specrt::SPECRT_ISA {

inline V16 relu(V16 x) {
    return max(zero(), x);
}

inline V16 gelu(V16 x) {
    const V16 t = min(splat(kGeluEnd), max(x, sub(zero(), x))), half = splat(-0.5f);
    const V16 square = mul(t, t), rest = fma(t, t, sub(zero(), square));
    V16 tail = exp(mul(half, square));
    tail = fma(tail, mul(half, rest), tail);
    const V16 u = div(splat(1.0f), fma(t, splat(kGeluStep), splat(1.0f)));
    V16 series = fma(splat(kGelu8), u, splat(kGelu7));
    series = fma(series, u, splat(kGelu6));
    series = fma(series, u, splat(kGelu5));
    series = fma(series, u, splat(kGelu4));
    series = fma(series, u, splat(kGelu3));
    series = fma(series, u, splat(kGelu2));
    series = fma(series, u, splat(kGelu1));
    series = fma(series, u, splat(kGelu0));
    return sub(relu(x), mul(t, mul(tail, mul(series, u))));
}

inline V16 gelu_tanh(V16 x) {
    const V16 slope = fma(mul(x, x), splat(kGeluTanhCube), splat(kGeluTanhSlope));
    return div(x, add(splat(1.0f), exp(mul(x, slope))));
}

template <Activation kKind>
inline V16 activated(V16 x) {
    if constexpr (kKind == Activation::kSilu) return silu(x);
    if constexpr (kKind == Activation::kGelu) return gelu(x);
    if constexpr (kKind == Activation::kGeluTanh) return gelu_tanh(x);
    const V16 y = relu(x);
    return kKind == Activation::kRelu ? y : mul(y, y);
}

// out = f(x), element by element; out may be x.
template <Activation kKind, typename T>
inline void activate_row(const T* x, T* out, int64_t width) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store(activated<kKind>(load(x + i)), out + i);
    const int rest = static_cast<int>(width - i);
    if (rest > 0) store_first(activated<kKind>(load_first(x + i, rest)), out + i, rest);
}

// out = f(gate) * up, element by element; out may be gate or up.
template <Activation kKind, typename T>
inline void gated_row(const T* gate, const T* up, T* out, int64_t width) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
        store(mul(activated<kKind>(load(gate + i)), load(up + i)), out + i);
    const int rest = static_cast<int>(width - i);
    if (rest > 0)
        store_first(mul(activated<kKind>(load_first(gate + i, rest)), load_first(up + i, rest)),
                    out + i, rest);
}

}  // namespace specrt::SPECRT_ISA
