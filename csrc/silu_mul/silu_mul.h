// out = silu(gate) * up, row by row; a row of gate_up holds gate, then up.
#pragma once
#include "core/dispatch.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct SiluMulParams {
    const void* gate_up;  // [M, 2 I]
    void* out;            // [M, I]
    int64_t gate_up_stride, out_stride;
    int64_t num_rows, width;
    DType dtype;  // of both
};

SPECRT_DECLARE_CPU(silu_mul_part)
SPECRT_DECLARE_CUDA(silu_mul_cuda)

Launch silu_mul(const TensorView& gate_up, const TensorView& out);

}  // namespace specrt
