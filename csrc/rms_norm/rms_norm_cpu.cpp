#include "core/simd.h"
#include "rms_norm/rms_norm.h"

namespace specrt::SPECRT_ISA {
namespace {

float sum_of_squares(const float* x, int64_t width) {
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

void add_into(float* residual, const float* x, int64_t width) {
    for (int64_t i = 0; i < width; ++i) residual[i] += x[i];
}

void normalise(const float* x, const float* weight, float scale, float* out, int64_t width) {
    const V16 s = splat(scale);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store(mul(mul(load(x + i), s), load(weight + i)), out + i);
    for (; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

}  // namespace

void rms_norm_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const RmsNormParams*>(params);
    const int64_t total = p.num_rows * p.num_slices;
    for (int64_t i = total * part / num_parts; i < total * (part + 1) / num_parts; ++i) {
        const int64_t row = i / p.num_slices, slice = i % p.num_slices;
        const float* x = p.x + row * p.x_stride[0] + slice * p.x_stride[1];
        if (p.residual) {
            float* residual =
                p.residual + row * p.residual_stride[0] + slice * p.residual_stride[1];
            add_into(residual, x, p.width);
            x = residual;
        }
        const float mean = sum_of_squares(x, p.width) / static_cast<float>(p.width);
        const float scale = 1.0f / __builtin_sqrtf(mean + p.eps);
        normalise(x, p.weight, scale, p.out + row * p.out_stride[0] + slice * p.out_stride[1],
                  p.width);
    }
}

}  // namespace specrt::SPECRT_ISA
