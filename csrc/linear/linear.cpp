#include "linear/linear.h"

namespace specrt {

Launch linear(const TensorView& x, const TensorView& weight, const TensorView& bias,
              const TensorView& residual, const TensorView& out) {
    const DType type = weight.dtype;
    SPECRT_CHECK(type == DType::kFloat32 || type == DType::kBFloat16 || type == DType::kFloat16,
                 "weight: expected float32, bfloat16 or float16, got ", weight.describe());
    expect(weight, type, "[N, K]", -1, -1);
    expect_contiguous(weight);
    const int64_t num_outputs = weight.shape[0], depth = weight.shape[1];
    expect(x, DType::kFloat32, "[M, K]", -1, depth);
    expect(out, DType::kFloat32, "[M, N]", x.shape[0], num_outputs);
    if (bias) expect(bias, DType::kFloat32, "[N]", num_outputs);
    if (residual) expect(residual, DType::kFloat32, "[M, N]", x.shape[0], num_outputs);
    const LinearParams p{x.as<float>(),        weight.data,     bias.as<float>(),
                         residual.as<float>(), out.as<float>(), x.stride[0],
                         residual.stride[0],   out.stride[0],   x.shape[0],
                         num_outputs,          depth,           type};
    // A part of less than ~8k multiply-adds is not worth another thread.
    const int64_t parts = 1 + x.shape[0] * num_outputs * depth / 8192;
    return make_launch(linear_part_for(active_isa()), p, parts);
}

}  // namespace specrt
