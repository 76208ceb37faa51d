#include "core/rows.h"
#include "draft_pairs/draft_pairs.h"

namespace specrt::SPECRT_ISA {
namespace {

template <typename T>
void one_sequence(const DraftPairsParams& p, int64_t seq) {
    const WaitingPairs waiting = waiting_pairs(p, seq);
    const T* taps = static_cast<const T*>(p.taps) + seq * p.taps_stride[0];
    T* features = static_cast<T*>(p.features) + seq * p.features_stride[0];
    for (int32_t pair = waiting.first_new; pair < waiting.count; ++pair)
        __builtin_memcpy(features + pair * p.features_stride[1],
                         taps + node_of(p, seq, waiting, pair) * p.taps_stride[1],
                         static_cast<size_t>(p.width) * sizeof(T));
    for (int32_t row = 0; row < p.pairs; ++row)
        p.tokens[row * p.tokens_stride + seq] = token_of(p, seq, waiting, row);
    write_counts(p, seq, waiting);
}

}  // namespace

void draft_pairs_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const DraftPairsParams*>(params);
    const int64_t batch = p.batch;
    with_float_type(p.dtype, [&](auto type) {
        for (int64_t seq = batch * part / num_parts; seq < batch * (part + 1) / num_parts; ++seq)
            one_sequence<decltype(type)>(p, seq);
    });
}

}  // namespace specrt::SPECRT_ISA
