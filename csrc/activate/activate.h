// out = f(gate) * up, row by row, where a row of x holds gate, then up; or out = f(x).
#pragma once
#include <string>

#include "core/activation.h"
#include "core/dispatch.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct ActivateParams {
    const void* x;  // [M, 2 I], or [M, I] if not gated
    void* out;      // [M, I]
    int64_t x_stride, out_stride;
    int64_t num_rows, width;
    DType dtype;  // of both
    Activation activation;
    bool is_gated;
};

SPECRT_DECLARE_CPU(activate_part)
SPECRT_DECLARE_CUDA(activate_cuda)

Launch activate(const TensorView& x, const TensorView& out, const std::string& activation,
                bool is_gated);

}  // namespace specrt
