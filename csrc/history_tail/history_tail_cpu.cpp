#include "history_tail/history_tail.h"

namespace specrt::SPECRT_ISA {

void history_tail_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const HistoryTailParams*>(params);
    const int64_t batch = p.batch;
    for (int64_t seq = batch * part / num_parts; seq < batch * (part + 1) / num_parts; ++seq) {
        const int32_t start = tail_start(p, seq);
        p.start[seq] = start;
        for (int32_t place = 0; place < p.width; ++place)
            p.tokens[seq * p.tokens_stride + place] = tail_token(p, seq, start, place);
    }
}

}  // namespace specrt::SPECRT_ISA
