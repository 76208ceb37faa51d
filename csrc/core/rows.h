// Operations on rows (T: float, bf16 or f16) that several kernels share: float32 arithmetic, each
// output rounded once. The hazards are those of core/simd.h.
#pragma once
#include "core/simd.h"
#include "core/tensor_view.h"

namespace specrt::SPECRT_ISA {

// Calls f with a value of the type that `dtype` names, for its type alone.
template <typename F>
inline void with_float_type(DType dtype, F&& f) {
    if (dtype == DType::kBFloat16) return f(bf16{});
    if (dtype == DType::kFloat16) return f(f16{});
    f(0.0f);
}

template <typename T>
inline float sum_of_squares(const T* x, int64_t width) {
    V16 sum = zero();
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        const V16 v = load(x + i);
        sum = fma(v, v, sum);
    }
    if (i < width) {
        const V16 v = load_first(x + i, static_cast<int>(width - i));
        sum = fma(v, v, sum);
    }
    return reduce_add(sum);
}

// out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
template <typename T>
inline void rms_norm_row(const T* x, const float* weight, float eps, T* out, int64_t width) {
    const float mean = sum_of_squares(x, width) / static_cast<float>(width);
    const float scale = 1.0f / __builtin_sqrtf(mean + eps);
    const V16 s = splat(scale);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store(mul(mul(load(x + i), s), load(weight + i)), out + i);
    for (; i < width; ++i) from_float(to_float(x[i]) * scale * weight[i], out + i);
}

inline V16 silu(V16 x) {
    return div(x, add(splat(1.0f), exp(sub(zero(), x))));
}

// Part `part` of `num_parts` of num_rows x width elements: calls f(row, begin, end) for spans of
// columns, cut at multiples of 16, so that one row can be shared too.
template <typename F>
inline void for_spans(int64_t num_rows, int64_t width, int part, int num_parts, F&& f) {
    const int64_t per_row = (width + 15) / 16, total = num_rows * per_row;
    int64_t unit = total * part / num_parts;
    const int64_t end = total * (part + 1) / num_parts;
    while (unit < end) {
        const int64_t row = unit / per_row, first = unit % per_row;
        const int64_t last = first + (end - unit) < per_row ? first + (end - unit) : per_row;
        f(row, first * 16, last * 16 < width ? last * 16 : width);
        unit += last - first;
    }
}

}  // namespace specrt::SPECRT_ISA
