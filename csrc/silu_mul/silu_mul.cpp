#include "silu_mul/silu_mul.h"

namespace specrt {

Launch silu_mul(const TensorView& gate_up, const TensorView& out) {
    expect_float(gate_up);
    expect(gate_up, gate_up.dtype, "[M, 2 I]", -1, -1);
    SPECRT_CHECK(gate_up.shape[1] % 2 == 0, "gate_up: expected an even width, got ",
                 gate_up.describe());
    const int64_t rows = gate_up.shape[0], width = gate_up.shape[1] / 2;
    expect_dtype_of(gate_up, out);
    expect(out, gate_up.dtype, "[M, I]", rows, width);
    const SiluMulParams p{gate_up.data, out.data, gate_up.stride[0], out.stride[0],
                          rows,         width,    gate_up.dtype};
    const int device = common_device(gate_up, out);
    if (device != kCpu) return make_cuda_launch(silu_mul_cuda, p, device);
    return make_launch(silu_mul_part_for(active_isa()), p, 1 + rows * width / 4096);
}

}  // namespace specrt
