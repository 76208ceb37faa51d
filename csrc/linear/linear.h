// y = x W^T (+ bias) (+ residual): core's multiplication with its arguments checked.
#pragma once
#include "core/matmul.h"

namespace specrt {

Launch linear(const TensorView& x, const TensorView& weight, const TensorView& bias,
              const TensorView& residual, const TensorView& out);

}  // namespace specrt
