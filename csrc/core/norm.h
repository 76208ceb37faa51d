// What rms_norm and layer_norm are told. With a residual, first residual += x, and the sum, as its
// type keeps it, is normalised (the "fused add").
#pragma once
#include "core/dispatch.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct NormArgs {
    TensorView x, weight, bias, residual, out;  // the bias and the residual may be empty
    float eps;
};

struct NormRows {
    const void* x;        // [M, S, H], last dimension contiguous; S > 1 for heads (qk-norm)
    void* residual;       // [M, S, H] in and out, or nullptr
    const float* weight;  // [H]
    const float* bias;    // [H] or nullptr
    void* out;            // [M, S, H]; may be x
    int64_t x_stride[2], residual_stride[2], out_stride[2];
    int64_t num_rows, num_slices, width;
    float eps;
    DType dtype;  // of x, residual and out
};

// A launch of either, which takes NormRows.
Launch norm_launch(const NormArgs& args, PartFn cpu, CudaFn cuda);

}  // namespace specrt
