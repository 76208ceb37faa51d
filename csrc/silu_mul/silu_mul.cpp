#include "silu_mul/silu_mul.h"

namespace specrt {

Launch silu_mul(const TensorView& gate_up, const TensorView& out) {
    expect(gate_up, DType::kFloat32, "[M, 2 I]", -1, -1);
    SPECRT_CHECK(gate_up.shape[1] % 2 == 0, "gate_up: expected an even width, got ",
                 gate_up.describe());
    const int64_t rows = gate_up.shape[0], width = gate_up.shape[1] / 2;
    expect(out, DType::kFloat32, "[M, I]", rows, width);
    const SiluMulParams p{
        gate_up.as<float>(), out.as<float>(), gate_up.stride[0], out.stride[0], rows, width};
    return make_launch(silu_mul_part_for(active_isa()), p, 1 + rows * width / 4096);
}

}  // namespace specrt
