#include "rms_norm/rms_norm.h"

namespace specrt {

Launch rms_norm(const TensorView& x, const TensorView& weight, const TensorView& residual,
                const TensorView& out, float eps) {
    SPECRT_CHECK(x.ndim == 2 || x.ndim == 3, "x: expected [M, H] or [M, S, H], got ", x.describe());
    const bool has_slices = x.ndim == 3;
    const int64_t num_slices = has_slices ? x.shape[1] : 1, width = x.shape[x.ndim - 1];
    const auto expect_rows = [&](const TensorView& t) {
        if (has_slices) {
            expect(t, DType::kFloat32, "[M, S, H]", x.shape[0], num_slices, width);
        } else {
            expect(t, DType::kFloat32, "[M, H]", x.shape[0], width);
        }
    };
    expect_rows(x);
    expect_rows(out);
    if (residual) expect_rows(residual);
    expect(weight, DType::kFloat32, "[H]", width);
    const auto slice_stride = [&](const TensorView& t) { return has_slices ? t.stride[1] : 0; };
    RmsNormParams p{x.as<float>(),
                    residual.as<float>(),
                    weight.as<float>(),
                    out.as<float>(),
                    {x.stride[0], slice_stride(x)},
                    {residual.stride[0], slice_stride(residual)},
                    {out.stride[0], slice_stride(out)},
                    x.shape[0],
                    num_slices,
                    width,
                    eps};
    // Below ~16k elements one thread is done before a second could have started.
    const int64_t parts = 1 + x.shape[0] * num_slices * width / 16384;
    return make_launch(rms_norm_part_for(active_isa()), p, parts);
}

}  // namespace specrt
