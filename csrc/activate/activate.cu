#include "activate/activate.h"
#include "core/elements.cuh"
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "core/silu.cuh"

namespace specrt {
namespace {

template <Activation kKind>
__device__ __forceinline__ float activated(float x) {
    if constexpr (kKind == Activation::kSilu) return silu(x);
    if constexpr (kKind == Activation::kGelu) return gelu_of(x);
    if constexpr (kKind == Activation::kGeluTanh) return gelu_tanh_of(x);
    const float y = relu_of(x);
    return kKind == Activation::kRelu ? y : y * y;
}

// A thread takes kSize neighbouring elements of a row.
template <Activation kKind, typename T, int kSize>
__global__ void __launch_bounds__(kElementThreads)
    activate_elements(const ActivateParams p, const unsigned blocks_per_row) {
    ptx::let_next_start();
    const auto [row, first] = elements_of_thread<kSize>(blocks_per_row);
    ptx::wait_for_previous();
    if (first >= p.width) return;
    const T* source = static_cast<const T*>(p.x) + row * p.x_stride + first;
    const Pack<T, kSize> x = load_pack<kSize>(source);
    Pack<T, kSize> up, out;
    if (p.is_gated) up = load_pack<kSize>(source + p.width);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
        const float y = activated<kKind>(to_float(x.at[e]));
        out.at[e] = from_float<T>(p.is_gated ? y * to_float(up.at[e]) : y);
    }
    store_pack(static_cast<T*>(p.out) + row * p.out_stride + first, out);
}

template <Activation kKind, typename T, int kSize>
void launch(const ActivateParams& p, CudaStream stream) {
    const unsigned blocks_per_row = element_blocks(p.width, kSize);
    const LaunchShape shape = element_shape(p.num_rows, blocks_per_row);
    SPECRT_LAUNCH((activate_elements<kKind, T, kSize>), shape, stream, p, blocks_per_row);
}

// Where `up` begins at a multiple of 16 bytes, no row ends within one.
bool can_move_16_bytes(const ActivateParams& p) {
    const int64_t bytes = size_of(p.dtype);
    return is_multiple_of_16(p.x) && is_multiple_of_16(p.out) &&
           is_multiple_of_16(p.width * bytes) && is_multiple_of_16(p.x_stride * bytes) &&
           is_multiple_of_16(p.out_stride * bytes);
}

}  // namespace

void activate_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const ActivateParams*>(params);
    if (p.num_rows * p.width == 0) return;
    with_activation(p.activation, [&](auto kind) {
        with_float_type(p.dtype, [&](auto type) {
            using T = decltype(type);
            constexpr Activation kKind = decltype(kind)::kKind;
            if (can_move_16_bytes(p)) return launch<kKind, T, 16 / sizeof(T)>(p, stream);
            launch<kKind, T, 1>(p, stream);
        });
    });
}

}  // namespace specrt
