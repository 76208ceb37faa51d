#include "history_append/history_append.h"

namespace specrt::SPECRT_ISA {
namespace {

// Of the first `most` tokens of a sequence; `most` if none is a stop token.
int32_t first_stop_of(const HistoryAppendParams& p, int64_t seq, int32_t most) {
    const int32_t* tokens = p.tokens + seq * p.tokens_stride;
    const int32_t* stop_ids = p.stop_ids + seq * p.stop_ids_stride;
    int32_t first = most;
    for (int32_t s = 0; s < p.stops; ++s)
        for (int32_t i = 0; i < first; ++i)
            if (is_stop(tokens[i], stop_ids[s])) first = i;
    return first;
}

int32_t deepest_of(const HistoryAppendParams& p, int64_t seq, int32_t num_nodes) {
    const int32_t* depth = p.depth + seq * p.depth_stride;
    int32_t deepest = 0;
    for (int32_t i = 0; i < num_nodes; ++i) deepest = depth[i] > deepest ? depth[i] : deepest;
    return clamped(deepest, 0, p.nodes - 1);
}

void report_column(int32_t* column, const int32_t* values, int32_t count, int32_t nodes,
                   int32_t padding) {
    for (int32_t i = 0; i < count; ++i) column[i] = values[i];
    for (int32_t i = count; i < nodes; ++i) column[i] = padding;
}

void report(const HistoryAppendParams& p, int64_t seq, const Accepted& a, int32_t taken,
            int32_t ending) {
    int32_t* row = p.report + seq * p.report_stride;
    write_header(row, a, deepest_of(p, seq, a.num_nodes), taken, ending);
    row += kReportHeaderSize;
    report_column(row, p.tokens + seq * p.tokens_stride, a.count, p.nodes, kNoToken);
    report_column(row + p.nodes, p.path + seq * p.path_stride, a.count, p.nodes, kNoToken);
    if (p.logprobs != nullptr)
        report_column(row + 2 * p.nodes, p.logprobs + seq * p.logprobs_stride, a.count, p.nodes,
                      kNoLogprob);
}

void append(const HistoryAppendParams& p, int64_t seq) {
    const Accepted a = accepted_of(p, seq);
    const int32_t first_stop = first_stop_of(p, seq, a.count);
    const int32_t taken = num_taken(a, first_stop);
    const int32_t* tokens = p.tokens + seq * p.tokens_stride;
    int32_t* end = p.history + seq * p.history_stride + a.length;
    for (int32_t i = 0; i < taken; ++i) end[i] = tokens[i];
    p.num_path[seq] = taken;
    if (taken > 0) {
        p.history_len[seq] = a.length + taken;
        p.roots[seq] = tokens[taken - 1];
    }
    const int32_t ending = ending_of(a, taken, first_stop);
    if (ending != 0) p.max_len[seq] = 0;
    report(p, seq, a, taken, ending);
}

}  // namespace

void history_append_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const HistoryAppendParams*>(params);
    const int64_t batch = p.batch;
    for (int64_t seq = batch * part / num_parts; seq < batch * (part + 1) / num_parts; ++seq)
        append(p, seq);
}

}  // namespace specrt::SPECRT_ISA
