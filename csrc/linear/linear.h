// y = x W^T (+ bias) (+ residual), weights streamed once, each row's bits its own.
#pragma once
#include "core/dispatch.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct LinearParams {
    const float* x;         // [M, K]
    const void* weight;     // [N, K] contiguous, of `weight_dtype`
    const float* bias;      // [N] or nullptr
    const float* residual;  // [M, N] or nullptr; may be out
    float* out;             // [M, N]
    int64_t x_stride, residual_stride, out_stride;
    int64_t num_rows, num_outputs, depth;
    DType weight_dtype;
};

SPECRT_DECLARE_CPU(linear_part)

Launch linear(const TensorView& x, const TensorView& weight, const TensorView& bias,
              const TensorView& residual, const TensorView& out);

}  // namespace specrt
