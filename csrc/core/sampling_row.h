// One request's sampling parameters: what acceptance draws the target's tokens by, and what coupled
// trees guess those draws by. One row for both, or the two would come to differ.
//
// In Python a row is eight int64 words (specrt/sampling/rows.py: sampling_row, which packs it):
//
//     word | low half           | high half
//     -----+--------------------+-------------------
//        0 | top_p, a double
//        1 | temperature        | min_p
//        2 | repetition_penalty | presence_penalty
//        3 | frequency_penalty  | top_k
//        4 | prompt_len         | unused
//        5 | seed
//        6 | bias_begin
//        7 | bias_end
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/host_device.h"

namespace specrt {

struct SamplingRow {
    double top_p;  // as given: float32's rounding of 0.999 moves the edge of the kept set
    float temperature, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    int32_t top_k, prompt_len, unused;  // top_k 0 is off
    uint64_t seed;
    int64_t bias_begin, bias_end;  // into the batch's bias_ids, bias_values
};
constexpr int64_t kSamplingWords = 8;
static_assert(sizeof(SamplingRow) == 8 * kSamplingWords);
static_assert(offsetof(SamplingRow, top_k) == 28 && offsetof(SamplingRow, seed) == 40);

SPECRT_HD bool has_top_k(const SamplingRow& s, int64_t vocab) {
    return s.top_k > 0 && s.top_k < vocab;
}
SPECRT_HD bool has_top_p(const SamplingRow& s) {
    return s.top_p < 1.0;
}
SPECRT_HD bool has_min_p(const SamplingRow& s) {
    return s.min_p > 0.0f;
}
// Whether masses or counts decide on what is kept.
SPECRT_HD bool is_weighed(const SamplingRow& s, int64_t vocab) {
    return s.temperature != 0.0f && (has_top_k(s, vocab) || has_top_p(s));
}
SPECRT_HD bool is_filtered(const SamplingRow& s, int64_t vocab) {
    return is_weighed(s, vocab) || (s.temperature != 0.0f && has_min_p(s));
}

}  // namespace specrt
