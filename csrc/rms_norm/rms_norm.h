// out = x / sqrt(mean(x^2) + eps) * weight, row by row, of what core/norm.h says.
#pragma once
#include "core/norm.h"

namespace specrt {

SPECRT_DECLARE_CPU(rms_norm_part)
SPECRT_DECLARE_CUDA(rms_norm_cuda)

Launch rms_norm(const TensorView& x, const TensorView& weight, const TensorView& residual,
                const TensorView& out, float eps);

}  // namespace specrt
