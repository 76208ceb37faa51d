#include "core/norm_rows.h"
#include "layer_norm/layer_norm.h"

namespace specrt::SPECRT_ISA {
namespace {

template <typename T>
float mean_of(const T* x, int64_t width) {
    V16 sum = zero();
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) sum = add(sum, load(x + i));
    if (i < width) sum = add(sum, load_first(x + i, static_cast<int>(width - i)));
    return reduce_add(sum) / static_cast<float>(width);
}

template <typename T>
float variance_of(const T* x, float mean, int64_t width) {
    V16 sum = zero();
    const V16 m = splat(mean);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
        const V16 v = sub(load(x + i), m);
        sum = fma(v, v, sum);
    }
    if (i < width) {
        const int rest = static_cast<int>(width - i);
        float differences[16];
        store(sub(load_first(x + i, rest), m), differences);
        const V16 v = load_first(differences, rest);  // nothing where there is no x
        sum = fma(v, v, sum);
    }
    return reduce_add(sum) / static_cast<float>(width);
}

template <typename T>
void one_row(const NormRows& p, const T* x, T* out) {
    const float mean = mean_of(x, p.width);
    const float scale = 1.0f / __builtin_sqrtf(variance_of(x, mean, p.width) + p.eps);
    const V16 m = splat(mean), s = splat(scale);
    int64_t i = 0;
    for (; i + 16 <= p.width; i += 16) {
        const V16 y = mul(mul(sub(load(x + i), m), s), load(p.weight + i));
        store(p.bias ? add(y, load(p.bias + i)) : y, out + i);
    }
    for (; i < p.width; ++i) {
        const float y = (to_float(x[i]) - mean) * scale * p.weight[i];
        from_float(p.bias ? y + p.bias[i] : y, out + i);
    }
}

}  // namespace

void layer_norm_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const NormRows*>(params);
    norm_rows_part(p, part, num_parts, [&](const auto* x, auto* out) { one_row(p, x, out); });
}

}  // namespace specrt::SPECRT_ISA
