#include "core/elements.cuh"
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "embed/embed.h"

namespace specrt {
namespace {

// Elements first .. first + kSize - 1 of the row's own in the table of positions. One by one: what
// they weigh beside the launch is little.
template <typename T, int kSize>
__device__ __forceinline__ Pack<float, kSize> positions_at(const PositionRows& p, int64_t row,
                                                           int64_t first) {
    const T* source = static_cast<const T*>(p.table) + position_start(p, row) + first;
    Pack<float, kSize> values;
#pragma unroll
    for (int e = 0; e < kSize; ++e) values.at[e] = to_float(source[e]);
    return values;
}

template <int kSize>
__device__ __forceinline__ Pack<float, kSize> positions_of(const PositionRows& p, int64_t row,
                                                           int64_t first) {
    if (p.dtype == DType::kBFloat16) return positions_at<bf16_t, kSize>(p, row, first);
    if (p.dtype == DType::kFloat16) return positions_at<f16_t, kSize>(p, row, first);
    return positions_at<float, kSize>(p, row, first);
}

// A thread takes kSize neighbouring elements of a row: 16 bytes of the narrower type.
template <typename From, typename To, int kSize, bool kIsAdjusted>
__global__ void __launch_bounds__(kElementThreads)
    embed_elements(const EmbedParams p, const unsigned blocks_per_row) {
    ptx::let_next_start();
    const auto [row, first] = elements_of_thread<kSize>(blocks_per_row);
    ptx::wait_for_previous();
    const bool is_open = is_any_open(p.open);
    if (first == 0) write_id(p, row, is_open);
    if (!is_open || first >= p.width) return;
    const auto source = load_pack<kSize>(static_cast<const From*>(p.table) +
                                         source_row(p, row) * p.table_stride + first);
    To* out = static_cast<To*>(p.out) + row * p.out_stride + first;
    if constexpr (kIsAdjusted) {
        Pack<float, kSize> position{};
        if (p.positions.table) position = positions_of<kSize>(p.positions, row, first);
        Pack<To, kSize> adjusted;
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
            const float y = to_float(source.at[e]) * p.scale;
            adjusted.at[e] = from_float<To>(p.positions.table ? y + position.at[e] : y);
        }
        store_pack(out, adjusted);
    } else if constexpr (std::is_same_v<From, To>) {  // NaN too to the bit
        store_pack(out, source);
    } else {
        Pack<To, kSize> converted;
#pragma unroll
        for (int e = 0; e < kSize; ++e) converted.at[e] = from_float<To>(to_float(source.at[e]));
        store_pack(out, converted);
    }
}

template <typename From, typename To, int kSize, bool kIsAdjusted>
void launch(const EmbedParams& p, CudaStream stream) {
    const unsigned blocks_per_row = element_blocks(p.width, kSize);
    const LaunchShape shape = element_shape(p.num_rows, blocks_per_row);
    SPECRT_LAUNCH((embed_elements<From, To, kSize, kIsAdjusted>), shape, stream, p, blocks_per_row);
}

bool can_move_pieces(const EmbedParams& p, int64_t size) {
    const int64_t from = size_of(p.table_dtype), to = size_of(p.out_dtype);
    return p.width % size == 0 && is_multiple_of_16(p.table) && is_multiple_of_16(p.out) &&
           is_multiple_of_16(p.table_stride * from) && is_multiple_of_16(p.out_stride * to);
}

}  // namespace

void embed_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const EmbedParams*>(params);
    if (p.num_rows * p.width == 0) return;
    with_float_type(p.table_dtype, [&](auto from) {
        with_float_type(p.out_dtype, [&](auto to) {
            using From = decltype(from);
            using To = decltype(to);
            constexpr int kSize = 16 / (sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
            if (is_adjusted(p)) {
                if (can_move_pieces(p, kSize)) return launch<From, To, kSize, true>(p, stream);
                return launch<From, To, 1, true>(p, stream);
            }
            if (can_move_pieces(p, kSize)) return launch<From, To, kSize, false>(p, stream);
            launch<From, To, 1, false>(p, stream);
        });
    });
}

}  // namespace specrt
