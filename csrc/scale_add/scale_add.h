// out = residual + c(factor * x), element by element, where c(s) = cap * tanh(s / cap), or s.
#pragma once
#include "core/dispatch.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct ScaleAddParams {
    const void* x;         // [M, H], last dimension contiguous
    const void* residual;  // [M, H] or nullptr
    void* out;             // [M, H]; may be x or residual
    int64_t x_stride, residual_stride, out_stride;
    int64_t num_rows, width;
    float factor, cap;  // 0: none
    DType dtype;        // of x, residual and out
};

SPECRT_DECLARE_CPU(scale_add_part)
SPECRT_DECLARE_CUDA(scale_add_cuda)

// `cap` is 0 where there is none.
Launch scale_add(const TensorView& x, float factor, const TensorView& residual, float cap,
                 const TensorView& out);

}  // namespace specrt
