// out = x / sqrt(mean(x^2) + eps) * weight, row by row; with a residual, first residual += x, and
// the sum, as its type keeps it, is normalised (the "fused add").
#pragma once
#include "core/dispatch.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct RmsNormParams {
    const void* x;        // [M, S, H], last dimension contiguous; S > 1 for heads (qk-norm)
    void* residual;       // [M, S, H] in and out, or nullptr
    const float* weight;  // [H]
    void* out;            // [M, S, H]; may be x
    int64_t x_stride[2], residual_stride[2], out_stride[2];
    int64_t num_rows, num_slices, width;
    float eps;
    DType dtype;  // of x, residual and out
};

SPECRT_DECLARE_CPU(rms_norm_part)
SPECRT_DECLARE_CUDA(rms_norm_cuda)

Launch rms_norm(const TensorView& x, const TensorView& weight, const TensorView& residual,
                const TensorView& out, float eps);

}  // namespace specrt
