#include "activate/activate.h"

namespace specrt {
namespace {

Activation activation_named(const std::string& name) {
    if (name == "silu") return Activation::kSilu;
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_tanh") return Activation::kGeluTanh;
    if (name == "relu") return Activation::kRelu;
    if (name == "relu2") return Activation::kRelu2;
    fail("activation: expected silu, gelu, gelu_tanh, relu or relu2, got ", name);
}

}  // namespace

Launch activate(const TensorView& x, const TensorView& out, const std::string& activation,
                bool is_gated) {
    const Activation kind = activation_named(activation);
    expect_float(x);
    expect(x, x.dtype, is_gated ? "[M, 2 I]" : "[M, I]", -1, -1);
    SPECRT_CHECK(!is_gated || x.shape[1] % 2 == 0, "x: expected an even width, got ", x.describe());
    const int64_t rows = x.shape[0], width = is_gated ? x.shape[1] / 2 : x.shape[1];
    expect_dtype_of(x, out);
    expect(out, x.dtype, "[M, I]", rows, width);
    const ActivateParams p{x.data, out.data, x.stride[0], out.stride[0], rows,
                           width,  x.dtype,  kind,        is_gated};
    const int device = common_device(x, out);
    if (device != kCpu) return make_cuda_launch(activate_cuda, p, device);
    return make_launch(activate_part_for(active_isa()), p, 1 + rows * width / 4096);
}

}  // namespace specrt
