#include "scale_add/scale_add.h"

namespace specrt {

Launch scale_add(const TensorView& x, float factor, const TensorView& residual, float cap,
                 const TensorView& out) {
    expect_float(x);
    expect(x, x.dtype, "[M, H]", -1, -1);
    const int64_t rows = x.shape[0], width = x.shape[1];
    for (const TensorView* t : {&residual, &out}) {
        if (!*t && t == &residual) continue;
        expect_dtype_of(x, *t);
        expect(*t, x.dtype, "[M, H]", rows, width);
    }
    const ScaleAddParams p{x.data,        residual.data, out.data, x.stride[0], residual.stride[0],
                           out.stride[0], rows,          width,    factor,      cap,
                           x.dtype};
    const int device = common_device(x, residual, out);
    if (device != kCpu) return make_cuda_launch(scale_add_cuda, p, device);
    // Below ~16k elements one thread is done before a second could have started; a tanh takes four
    // times as long.
    return make_launch(scale_add_part_for(active_isa()), p,
                       1 + rows * width / (cap > 0.0f ? 4096 : 16384));
}

}  // namespace specrt
