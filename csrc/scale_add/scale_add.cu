#include "core/elements.cuh"
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "core/tanh.h"
#include "scale_add/scale_add.h"

namespace specrt {
namespace {

// A thread takes kSize neighbouring elements of a row.
template <typename T, int kSize>
__global__ void __launch_bounds__(kElementThreads)
    scale_add_elements(const ScaleAddParams p, const unsigned blocks_per_row) {
    ptx::let_next_start();
    const auto [row, first] = elements_of_thread<kSize>(blocks_per_row);
    ptx::wait_for_previous();
    if (first >= p.width) return;
    const T* residual =
        p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride + first : nullptr;
    const auto x = load_pack<kSize>(static_cast<const T*>(p.x) + row * p.x_stride + first);
    Pack<T, kSize> other, out;
    if (residual) other = load_pack<kSize>(residual);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
        float y = p.factor * to_float(x.at[e]);
        if (p.cap > 0.0f) y = p.cap * tanh_of(y / p.cap);
        out.at[e] = from_float<T>(residual ? to_float(other.at[e]) + y : y);
    }
    store_pack(static_cast<T*>(p.out) + row * p.out_stride + first, out);
}

template <typename T, int kSize>
void launch(const ScaleAddParams& p, CudaStream stream) {
    const unsigned blocks_per_row = element_blocks(p.width, kSize);
    const LaunchShape shape = element_shape(p.num_rows, blocks_per_row);
    SPECRT_LAUNCH((scale_add_elements<T, kSize>), shape, stream, p, blocks_per_row);
}

bool can_move_16_bytes(const ScaleAddParams& p) {
    const int64_t bytes = size_of(p.dtype);
    return is_multiple_of_16(p.x) && is_multiple_of_16(p.residual) && is_multiple_of_16(p.out) &&
           is_multiple_of_16(p.width * bytes) && is_multiple_of_16(p.x_stride * bytes) &&
           is_multiple_of_16(p.residual_stride * bytes) && is_multiple_of_16(p.out_stride * bytes);
}

}  // namespace

void scale_add_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const ScaleAddParams*>(params);
    if (p.num_rows * p.width == 0) return;
    with_float_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (can_move_16_bytes(p)) return launch<T, 16 / sizeof(T)>(p, stream);
        launch<T, 1>(p, stream);
    });
}

}  // namespace specrt
