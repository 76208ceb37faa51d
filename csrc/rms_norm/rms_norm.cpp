#include "rms_norm/rms_norm.h"

namespace specrt {

Launch rms_norm(const TensorView& x, const TensorView& weight, const TensorView& residual,
                const TensorView& out, float eps) {
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
    expect_rows(out);
    if (residual) expect_rows(residual);
    expect(weight, DType::kFloat32, "[H]", width);
    SPECRT_CHECK(x.shape[0] * num_slices <= INT32_MAX && width <= INT32_MAX,
                 "x: expected at most 2^31 - 1 rows of as many elements, got ", x.describe());
    const auto slice_stride = [&](const TensorView& t) { return has_slices ? t.stride[1] : 0; };
    RmsNormParams p{x.data,
                    residual.data,
                    weight.as<float>(),
                    out.data,
                    {x.stride[0], slice_stride(x)},
                    {residual.stride[0], slice_stride(residual)},
                    {out.stride[0], slice_stride(out)},
                    x.shape[0],
                    num_slices,
                    width,
                    eps,
                    x.dtype};
    const int device = common_device(x, weight, residual, out);
    if (device != kCpu) return make_cuda_launch(rms_norm_cuda, p, device);
    // Below ~16k elements one thread is done before a second could have started.
    const int64_t parts = 1 + x.shape[0] * num_slices * width / 16384;
    return make_launch(rms_norm_part_for(active_isa()), p, parts);
}

}  // namespace specrt
