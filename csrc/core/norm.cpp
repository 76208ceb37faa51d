#include "core/norm.h"

namespace specrt {

Launch norm_launch(const NormArgs& a, PartFn cpu, CudaFn cuda) {
    const TensorView& x = a.x;
    SPECRT_CHECK(x.ndim == 2 || x.ndim == 3, "x: expected [M, H] or [M, S, H], got ", x.describe());
    const bool has_slices = x.ndim == 3;
    const int64_t num_slices = has_slices ? x.shape[1] : 1, width = x.shape[x.ndim - 1];
    const auto expect_rows = [&](const TensorView& t) {
        expect_dtype_of(x, t);
        if (has_slices) {
            expect(t, x.dtype, "[M, S, H]", x.shape[0], num_slices, width);
        } else {
            expect(t, x.dtype, "[M, H]", x.shape[0], width);
        }
    };
    expect_float(x);
    expect_rows(x);
    expect_rows(a.out);
    if (a.residual) expect_rows(a.residual);
    expect(a.weight, DType::kFloat32, "[H]", width);
    if (a.bias) expect(a.bias, DType::kFloat32, "[H]", width);
    SPECRT_CHECK(x.shape[0] * num_slices <= INT32_MAX && width <= INT32_MAX,
                 "x: expected at most 2^31 - 1 rows of as many elements, got ", x.describe());
    const auto slice_stride = [&](const TensorView& t) { return has_slices ? t.stride[1] : 0; };
    const NormRows p{x.data,
                     a.residual.data,
                     a.weight.as<float>(),
                     a.bias.as<float>(),
                     a.out.data,
                     {x.stride[0], slice_stride(x)},
                     {a.residual.stride[0], slice_stride(a.residual)},
                     {a.out.stride[0], slice_stride(a.out)},
                     x.shape[0],
                     num_slices,
                     width,
                     a.eps,
                     x.dtype};
    const int device = common_device(x, a.weight, a.bias, a.residual, a.out);
    if (device != kCpu) return make_cuda_launch(cuda, p, device);
    // Below ~16k elements one thread is done before a second could have started.
    return make_launch(cpu, p, 1 + x.shape[0] * num_slices * width / 16384);
}

}  // namespace specrt
