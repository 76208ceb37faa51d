#include "core/rows.h"
#include "rms_norm/rms_norm.h"

namespace specrt::SPECRT_ISA {
namespace {

void add_into(float* residual, const float* x, int64_t width) {
    for (int64_t i = 0; i < width; ++i) residual[i] += x[i];
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
        rms_norm_row(x, p.weight, p.eps, p.out + row * p.out_stride[0] + slice * p.out_stride[1],
                     p.width);
    }
}

}  // namespace specrt::SPECRT_ISA
