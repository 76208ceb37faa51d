// y = x W^T (+ bias) (+ residual), weights streamed once, each row's bits its own: the one
// multiplication of all kernels that multiply by weights.
#pragma once
#include "core/dispatch.h"
#include "core/open.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct MatmulParams {
    const float* x;         // [M, K]
    const void* weight;     // [N, K] contiguous, of `weight_dtype`
    const float* bias;      // [N] or nullptr
    const float* residual;  // [M, N] or nullptr; may be out
    float* out;             // [M, N]
    int64_t x_stride, residual_stride, out_stride;
    int64_t num_rows, num_outputs, depth;
    DType weight_dtype;
    const float* scale;  // [N], of e4m3 weights: before the bias; otherwise nullptr
    Openness openness = {};
};

SPECRT_DECLARE_CPU(matmul_part)

Launch matmul(const MatmulParams& p);

// A matrix that matmul can stream: contiguous, float32, bfloat16, float16 or (scaled) e4m3.
template <typename... Sizes>
inline void expect_weight(const TensorView& t, const char* wanted, Sizes... sizes) {
    if (t.dtype != DType::kE4M3) expect_float(t);
    expect(t, t.dtype, wanted, sizes...);
    expect_contiguous(t);
}

// The factors of e4m3 weights, which no other weights have.
inline void expect_scale(const TensorView& weight, const TensorView& scale) {
    const bool is_narrow = weight && weight.dtype == DType::kE4M3;
    SPECRT_CHECK(is_narrow || !scale, scale.name, ": expected None, as ", weight.name, " is ",
                 weight ? name_of(weight.dtype) : "None", ", got ", scale.describe());
    if (!is_narrow) return;
    SPECRT_CHECK(scale, scale.name, ": expected [N] = [", weight.shape[0], "] float32, as ",
                 weight.name, " is float8_e4m3fn, got None");
    expect(scale, DType::kFloat32, "[N]", weight.shape[0]);
}

}  // namespace specrt
