// The last W tokens of each history, and where they begin: what a drafter with a cache of its own
// runs to catch up with what was accepted, whose number the host does not know yet. Rows that were
// run before are run again, to the same bits; so the last token is always in the last place.
//
//   history  7 3 9 4 | - -      history_len 4, W 3      tokens  3 9 4      start 1
#pragma once
#include "core/dispatch.h"
#include "core/host_device.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct HistoryTailParams {
    const int32_t* history;      // [B, T]
    const int32_t* history_len;  // [B]
    int32_t* tokens;             // [B, W]
    int32_t* start;              // [B]
    int64_t history_stride, tokens_stride;
    int32_t batch, room, width;  // room: T, width: W
};

// Lengths may be anything; one that is below W begins at 0. It is clamped from below too: nvcc
// makes max(end - width, 0) of the choice, which wraps where `end` is near the least of all
// integers.
SPECRT_HD int32_t tail_start(const HistoryTailParams& p, int64_t seq) {
    const int32_t length = p.history_len[seq];
    const int32_t end = length < 0 ? 0 : length < p.room ? length : p.room;
    return end > p.width ? end - p.width : 0;
}

// The tail's token; 0 where the history is too short for one.
SPECRT_HD int32_t tail_token(const HistoryTailParams& p, int64_t seq, int32_t start,
                             int32_t place) {
    const int64_t index = int64_t{start} + place;
    return index < p.room ? p.history[seq * p.history_stride + index] : 0;
}

SPECRT_DECLARE_CPU(history_tail_part)
SPECRT_DECLARE_CUDA(history_tail_cuda)

struct HistoryTailArgs {
    TensorView history, history_len, tokens, start;
};
Launch history_tail(const HistoryTailArgs& args);

}  // namespace specrt
