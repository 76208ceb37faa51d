// out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, row by row, of what core/norm.h says.
// The mean is taken first, then the mean square of what differs from it: a sum of squares of x
// would cancel where the mean is large.
#pragma once
#include "core/norm.h"

namespace specrt {

SPECRT_DECLARE_CPU(layer_norm_part)
SPECRT_DECLARE_CUDA(layer_norm_cuda)

Launch layer_norm(const NormArgs& args);

}  // namespace specrt
