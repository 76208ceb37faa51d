#include "history_tail/history_tail.h"

namespace specrt {

Launch history_tail(const HistoryTailArgs& a) {
    expect(a.history, DType::kInt32, "[B, T]", -1, -1);
    const int64_t batch = a.history.shape[0], room = a.history.shape[1];
    SPECRT_CHECK(room <= INT32_MAX, "history: expected T < 2^31, got ", a.history.describe());
    expect(a.tokens, DType::kInt32, "[B, W]", batch, -1);
    const int64_t width = a.tokens.shape[1];
    SPECRT_CHECK(width <= INT32_MAX, "tokens: expected W < 2^31, got ", a.tokens.describe());
    for (const TensorView* t : {&a.history_len, &a.start}) expect(*t, DType::kInt32, "[B]", batch);
    for (const TensorView* in : {&a.history, &a.history_len})
        for (const TensorView* out : {&a.tokens, &a.start}) expect_apart(*in, *out);

    HistoryTailParams p{};
    p.history = a.history.as<int32_t>();
    p.history_len = a.history_len.as<int32_t>();
    p.tokens = a.tokens.as<int32_t>();
    p.start = a.start.as<int32_t>();
    p.history_stride = a.history.stride[0];
    p.tokens_stride = a.tokens.stride[0];
    p.batch = static_cast<int32_t>(batch);
    p.room = static_cast<int32_t>(room);
    p.width = static_cast<int32_t>(width);
    const int device = common_device(a.history, a.history_len, a.tokens, a.start);
    if (device != kCpu) return make_cuda_launch(history_tail_cuda, p, device);
    return make_launch(history_tail_part_for(active_isa()), p, 1);
}

}  // namespace specrt
