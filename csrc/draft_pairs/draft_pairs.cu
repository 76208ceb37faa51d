// A block has one place for a pair: it copies the feature, if the pair is a new one, and looks up
// one row's token. Block 0 of a sequence writes the counts.
//
// Hazard: all blocks of a sequence read the numbers that make its counts, so none of these may be
// written: kv_len is read if pairs are kept, and written if not.
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "draft_pairs/draft_pairs.h"

namespace specrt {
namespace {

constexpr int kBlock = 128;

// A thread moves kSize neighbouring elements at a time.
template <typename T, int kSize>
__global__ void __launch_bounds__(kBlock) draft_pairs_place(const DraftPairsParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    const int64_t seq = blockIdx.x;
    const auto place = static_cast<int32_t>(blockIdx.y);
    const WaitingPairs waiting = waiting_pairs(p, seq);
    if (threadIdx.x == 0) {
        p.tokens[place * p.tokens_stride + seq] = token_of(p, seq, waiting, place);
        if (place == 0) write_counts(p, seq, waiting);
    }
    if (place < waiting.first_new || place >= waiting.count) return;
    const T* from = static_cast<const T*>(p.taps) + seq * p.taps_stride[0] +
                    node_of(p, seq, waiting, place) * p.taps_stride[1];
    T* to = static_cast<T*>(p.features) + seq * p.features_stride[0] + place * p.features_stride[1];
    for (int64_t i = int64_t{threadIdx.x} * kSize; i < p.width; i += int64_t{kBlock} * kSize)
        store_pack(to + i, load_pack<kSize>(from + i));
}

template <typename T, int kSize>
void launch(const DraftPairsParams& p, CudaStream stream) {
    const dim3 grid(static_cast<unsigned>(p.batch), static_cast<unsigned>(p.pairs));
    const LaunchShape shape{grid, dim3(kBlock), 0, kOverlaps};
    SPECRT_LAUNCH((draft_pairs_place<T, kSize>), shape, stream, p);
}

template <typename T>
bool can_move_pieces(const DraftPairsParams& p, int64_t size) {
    const auto is_whole = [&](const int64_t (&stride)[2]) {
        return stride[0] % size == 0 && stride[1] % size == 0;
    };
    return p.width % size == 0 && is_multiple_of_16(p.taps) && is_multiple_of_16(p.features) &&
           is_whole(p.taps_stride) && is_whole(p.features_stride);
}

}  // namespace

void draft_pairs_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const DraftPairsParams*>(params);
    if (p.batch == 0) return;
    with_float_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int kSize = 16 / sizeof(T);
        if (can_move_pieces<T>(p, kSize)) return launch<T, kSize>(p, stream);
        launch<T, 1>(p, stream);
    });
}

}  // namespace specrt
