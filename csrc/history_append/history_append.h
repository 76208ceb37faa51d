// The tail of acceptance: a sequence's accepted tokens behind its history, up to the first stop
// token or the length it may have; and of the round what the host wants to know, as one row.
//
//   history   5 8 3 | .  .  .  .         history_len 3, max_len 7: room for 4
//   tokens    9 4 2 6 7                  accept_length 4; stop_ids 2
//   after     5 8 3   9  4  2 | .        history_len 6, root 2, num_path 3
//   report    nodes, deepest, accept_length 4, taken 3, ending kStopToken, 0 0 0,
//             tokens 9 4 2 6 7, path, log-probabilities
//
// The cache takes as many rows as the history tokens: the root's and those of the accepted ones
// before the last, which is the next root.
//
// A sequence that ends has no room from then on: rounds that were launched before anybody knew take
// nothing.
#pragma once
#include "core/dispatch.h"
#include "core/host_device.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

// Words of a report; those up to kHeaderSize that have no name are 0. Behind it are N tokens, N
// nodes of the path and (where asked for) the bits of N log-probabilities.
enum ReportWord : int32_t {
    kReportNumNodes,
    kReportDeepest,  // the largest distance from the root
    kReportAcceptLength,
    kReportNumTaken,
    kReportEnding,
    kReportHeaderSize = 8,
};

// Why a sequence ends, or'ed; 0 if it goes on.
enum Ending : int32_t {
    kEndingStopToken = 1,  // the last taken token is one
    kEndingMaxLen = 2,     // the history has no room for another
    kEndingBadLogits = 4,
};

constexpr int32_t kNoToken = -1;
constexpr int32_t kNoLogprob = 0x7fc00000;  // NaN's bits

struct HistoryAppendParams {
    static constexpr int kMaxNodes = 128;

    const int32_t* num_nodes;      // [B]
    const int32_t* depth;          // [B, N]
    const int32_t* path;           // [B, N]
    const int32_t* accept_length;  // [B]
    const int32_t* tokens;         // [B, N]
    const int32_t* logprobs;       // [B, N], as bits; or nullptr
    const int32_t* stop_ids;       // [B, S]; negative: none
    int32_t* max_len;              // [B], in and out: 0 once it has ended
    int32_t* history;              // [B, T], in and out
    int32_t* history_len;          // [B], in and out
    int32_t* roots;                // [B], in and out
    int32_t* num_path;             // [B]
    int32_t* report;               // [B, kReportHeaderSize + 2 * N or 3 * N]
    // From a sequence to the next.
    int64_t depth_stride, path_stride, tokens_stride, logprobs_stride, stop_ids_stride,
        history_stride, report_stride;
    int32_t batch, nodes, stops, slots;  // N, S, T
};

// What a sequence has to append, and the room behind its history; whatever its numbers hold.
struct Accepted {
    int32_t num_nodes, accept_length;
    int32_t count;   // tokens, 0 to N
    int32_t length;  // of the history; where it is none there is no room
    int32_t room;    // tokens, 0 to T
};

SPECRT_HD int32_t clamped(int32_t x, int32_t least, int32_t most) {
    return x < least ? least : x > most ? most : x;
}

SPECRT_HD Accepted accepted_of(const HistoryAppendParams& p, int64_t seq) {
    Accepted a;
    a.num_nodes = clamped(p.num_nodes[seq], 0, p.nodes);
    a.accept_length = clamped(p.accept_length[seq], -1, p.nodes - 1);
    a.count = a.accept_length + 1;
    a.length = p.history_len[seq];
    const int32_t most = clamped(p.max_len[seq], 0, p.slots);
    a.room = 0 <= a.length && a.length < most ? most - a.length : 0;
    return a;
}

SPECRT_HD bool is_stop(int32_t token, int32_t stop_id) {
    return token == stop_id && stop_id >= 0;
}

// How many tokens are taken, if the first stop token is tokens[first_stop]; any number from the
// count on if there is none.
SPECRT_HD int32_t num_taken(const Accepted& a, int32_t first_stop) {
    const int32_t most = a.count < a.room ? a.count : a.room;
    return first_stop < most ? first_stop + 1 : most;
}

SPECRT_HD int32_t ending_of(const Accepted& a, int32_t taken, int32_t first_stop) {
    return (first_stop < taken ? kEndingStopToken : 0) | (taken == a.room ? kEndingMaxLen : 0) |
           (a.accept_length < 0 ? kEndingBadLogits : 0);
}

SPECRT_HD void write_header(int32_t* report, const Accepted& a, int32_t deepest, int32_t taken,
                            int32_t ending) {
    for (int32_t word = 0; word < kReportHeaderSize; ++word) report[word] = 0;
    report[kReportNumNodes] = a.num_nodes;
    report[kReportDeepest] = deepest;
    report[kReportAcceptLength] = a.accept_length;
    report[kReportNumTaken] = taken;
    report[kReportEnding] = ending;
}

SPECRT_DECLARE_CPU(history_append_part)
SPECRT_DECLARE_CUDA(history_append_cuda)

struct HistoryAppendArgs {
    TensorView num_nodes, depth, path, accept_length, tokens, logprobs, stop_ids, max_len, history,
        history_len, roots, num_path, report;
};
Launch history_append(const HistoryAppendArgs& args);

}  // namespace specrt
