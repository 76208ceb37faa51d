#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "core/silu.cuh"
#include "silu_mul/silu_mul.h"

namespace specrt {
namespace {

constexpr int kBlock = 256;

// A thread takes kSize neighbouring elements of a row.
template <typename T, int kSize>
__global__ void __launch_bounds__(kBlock)
    silu_mul_elements(const SiluMulParams p, const unsigned blocks_per_row) {
    ptx::let_next_start();
    const int64_t row = blockIdx.x / blocks_per_row;
    const unsigned block = blockIdx.x % blocks_per_row;
    const int64_t first = (int64_t{block} * kBlock + threadIdx.x) * kSize;
    ptx::wait_for_previous();
    if (first >= p.width) return;
    const T* source = static_cast<const T*>(p.gate_up) + row * p.gate_up_stride + first;
    const Pack<T, kSize> gate = load_pack<kSize>(source), up = load_pack<kSize>(source + p.width);
    Pack<T, kSize> out;
#pragma unroll
    for (int e = 0; e < kSize; ++e)
        out.at[e] = from_float<T>(silu(to_float(gate.at[e])) * to_float(up.at[e]));
    store_pack(static_cast<T*>(p.out) + row * p.out_stride + first, out);
}

template <typename T, int kSize>
void launch(const SiluMulParams& p, CudaStream stream) {
    const unsigned blocks_per_row = ceil_div(p.width, kBlock * kSize);
    const LaunchShape shape{dim3(static_cast<unsigned>(p.num_rows) * blocks_per_row), dim3(kBlock),
                            0, kOverlaps};
    SPECRT_LAUNCH((silu_mul_elements<T, kSize>), shape, stream, p, blocks_per_row);
}

// Where `up` begins at a multiple of 16 bytes, no row ends within one.
bool can_move_16_bytes(const SiluMulParams& p) {
    const int64_t bytes = size_of(p.dtype);
    return is_multiple_of_16(p.gate_up) && is_multiple_of_16(p.out) &&
           is_multiple_of_16(p.width * bytes) && is_multiple_of_16(p.gate_up_stride * bytes) &&
           is_multiple_of_16(p.out_stride * bytes);
}

}  // namespace

void silu_mul_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const SiluMulParams*>(params);
    if (p.num_rows * p.width == 0) return;
    with_float_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (can_move_16_bytes(p)) return launch<T, 16 / sizeof(T)>(p, stream);
        launch<T, 1>(p, stream);
    });
}

}  // namespace specrt
