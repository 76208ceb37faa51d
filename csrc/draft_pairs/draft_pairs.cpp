#include "draft_pairs/draft_pairs.h"

namespace specrt {
namespace {

void expect_apart_all(const DraftPairsArgs& a) {
    for (const TensorView* in : {&a.taps, &a.path, &a.num_path, &a.history, &a.history_len})
        for (const TensorView* out : {&a.features, &a.tokens, &a.source, &a.kv_len, &a.kv_len_after,
                                      &a.num_earlier, &a.bits})
            expect_apart(*in, *out);
}

}  // namespace

Launch draft_pairs(const DraftPairsArgs& a) {
    expect_float(a.taps);
    expect(a.taps, a.taps.dtype, "[B, N, H]", -1, -1, -1);
    const int64_t batch = a.taps.shape[0], nodes = a.taps.shape[1], width = a.taps.shape[2];
    SPECRT_CHECK(nodes > 0 && nodes <= INT32_MAX, "taps: expected N from 1 to 2^31 - 1, got ",
                 a.taps.describe());
    expect(a.path, DType::kInt32, "[B, D]", batch, -1);
    SPECRT_CHECK(a.path.shape[1] <= INT32_MAX, "path: expected D < 2^31, got ", a.path.describe());
    expect(a.history, DType::kInt32, "[B, T]", batch, -1);
    const int64_t room = a.history.shape[1];
    SPECRT_CHECK(room > 0 && room <= INT32_MAX, "history: expected T from 1 to 2^31 - 1, got ",
                 a.history.describe());
    expect_dtype_of(a.taps, a.features);
    expect(a.features, a.taps.dtype, "[B, P, H]", batch, -1, width);
    const int64_t pairs = a.features.shape[1];
    SPECRT_CHECK(pairs > 0 && pairs <= DraftPairsParams::kMaxPairs && batch * pairs <= INT32_MAX,
                 "features: expected P from 1 to ", DraftPairsParams::kMaxPairs, ", got ",
                 a.features.describe());
    expect(a.tokens, DType::kInt32, "[P, B]", pairs, batch);
    for (const TensorView* t :
         {&a.num_path, &a.history_len, &a.source, &a.kv_len, &a.kv_len_after, &a.num_earlier})
        expect(*t, DType::kInt32, "[B]", batch);
    expect(a.bits, DType::kInt64, "[B, W]", batch, -1);
    const int64_t words = a.bits.shape[1];
    SPECRT_CHECK(words > 0 && words <= INT32_MAX, "bits: expected at least one word, got ",
                 a.bits.describe());
    expect_apart_all(a);

    DraftPairsParams p{};
    p.taps = a.taps.data;
    p.path = a.path.as<int32_t>();
    p.num_path = a.num_path.as<int32_t>();
    p.history = a.history.as<int32_t>();
    p.history_len = a.history_len.as<int32_t>();
    p.features = a.features.data;
    p.tokens = a.tokens.as<int32_t>();
    p.source = a.source.as<int32_t>();
    p.kv_len = a.kv_len.as<int32_t>();
    p.kv_len_after = a.kv_len_after.as<int32_t>();
    p.num_earlier = a.num_earlier.as<int32_t>();
    p.bits = a.bits.as<int64_t>();
    for (int i = 0; i < 2; ++i) {
        p.taps_stride[i] = a.taps.stride[i];
        p.features_stride[i] = a.features.stride[i];
    }
    p.path_stride = a.path.stride[0];
    p.history_stride = a.history.stride[0];
    p.tokens_stride = a.tokens.stride[0];
    p.bits_stride = a.bits.stride[0];
    p.width = width;
    p.batch = static_cast<int32_t>(batch);
    p.nodes = static_cast<int32_t>(nodes);
    p.path_size = static_cast<int32_t>(a.path.shape[1]);
    p.room = static_cast<int32_t>(room);
    p.pairs = static_cast<int32_t>(pairs);
    p.words = static_cast<int32_t>(words);
    p.dtype = a.taps.dtype;
    p.are_kept = a.are_kept;
    const int device =
        common_device(a.taps, a.path, a.num_path, a.history, a.history_len, a.features, a.tokens,
                      a.source, a.kv_len, a.kv_len_after, a.num_earlier, a.bits);
    if (device != kCpu) return make_cuda_launch(draft_pairs_cuda, p, device);
    return make_launch(draft_pairs_part_for(active_isa()), p, batch);
}

}  // namespace specrt
