// A thread moves 16 bytes of a row, or one value where rows are not at multiples of 16 bytes. All
// tensors have one type of 16 bits, so values are moved as they are, whatever they mean.
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "feature_sample/feature_sample.h"

namespace specrt {
namespace {

constexpr int kBlock = 128;
constexpr int kBytes = 2;  // of a value

// Grid: rows * blocks_per_row, and the sources.
template <int kSize>
__global__ void __launch_bounds__(kBlock)
    gather_rows(const GatherParams p, const unsigned blocks_per_row) {
    ptx::let_next_start();
    const RowSource& from = p.from[blockIdx.y];
    const int64_t m = blockIdx.x / blocks_per_row;
    const int64_t block = blockIdx.x % blocks_per_row;
    const int64_t first = (block * kBlock + threadIdx.x) * kSize;
    ptx::wait_for_previous();
    if (first >= from.width) return;
    const int64_t row = chosen_row(p, static_cast<int>(blockIdx.y), m);
    const auto* source = static_cast<const uint16_t*>(from.rows) + row * from.stride + first;
    auto* to = static_cast<uint16_t*>(p.workspace) + m * p.workspace_stride + from.to + first;
    store_pack(to, load_pack<kSize>(source));
}

template <int kSize>
void launch(const GatherParams& p, CudaStream stream) {
    int64_t widest = 0;
    for (int i = 0; i < p.num_sources; ++i)
        widest = p.from[i].width > widest ? p.from[i].width : widest;
    const unsigned blocks_per_row = ceil_div(widest, kBlock * kSize);
    const LaunchShape shape{dim3(static_cast<unsigned>(p.num_rows) * blocks_per_row,
                                 static_cast<unsigned>(p.num_sources)),
                            dim3(kBlock), 0, kOverlaps};
    SPECRT_LAUNCH(gather_rows<kSize>, shape, stream, p, blocks_per_row);
}

bool can_move_16_bytes(const GatherParams& p) {
    bool fits = is_multiple_of_16(p.workspace) && is_multiple_of_16(p.workspace_stride * kBytes);
    for (int i = 0; i < p.num_sources; ++i) {
        const RowSource& from = p.from[i];
        fits = fits && is_multiple_of_16(from.rows) && is_multiple_of_16(from.stride * kBytes) &&
               is_multiple_of_16(from.width * kBytes) && is_multiple_of_16(from.to * kBytes);
    }
    return fits;
}

}  // namespace

void feature_gather_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const GatherParams*>(params);
    if (p.num_rows == 0) return;
    if (can_move_16_bytes(p)) return launch<16 / kBytes>(p, stream);
    launch<1>(p, stream);
}

}  // namespace specrt
