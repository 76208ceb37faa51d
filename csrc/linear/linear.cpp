#include "linear/linear.h"

namespace specrt {

Launch linear(const TensorView& x, const TensorView& weight, const TensorView& bias,
              const TensorView& residual, const TensorView& out) {
    expect_weight(weight, "[N, K]", -1, -1);
    const int64_t num_outputs = weight.shape[0], depth = weight.shape[1];
    expect(x, DType::kFloat32, "[M, K]", -1, depth);
    expect(out, DType::kFloat32, "[M, N]", x.shape[0], num_outputs);
    if (bias) expect(bias, DType::kFloat32, "[N]", num_outputs);
    if (residual) expect(residual, DType::kFloat32, "[M, N]", x.shape[0], num_outputs);
    return matmul({x.as<float>(), weight.data, bias.as<float>(), residual.as<float>(),
                   out.as<float>(), x.stride[0], residual.stride[0], out.stride[0], x.shape[0],
                   num_outputs, depth, weight.dtype});
}

}  // namespace specrt
