// What a drafter over the target's features runs next of each sequence: the pairs (feature of a
// token, the token behind it) that it has not run yet. Features come from the accepted path of the
// round that was verified, tokens from the histories, to which they have been appended; so nobody
// need know how many there are.
//
//   history  7 3 9 4 6        5 tokens, of whose 4 pairs the drafter has run 1
//   pairs        3|9  9|4  4|6        kv_len 1, kv_len_after 4, num_earlier 2, bits 111
//   features  slots 0, 1, 2 of the sequence
//   tokens    6 in row 0, where each sequence's last pair stands; 9, 4 in rows 1, 2
//   source    slot 2, the last pair's
//
// If pairs are kept, those that had been waiting go on waiting in front of the new ones; otherwise
// they have been run. Whatever the numbers hold, there are 0 to P pairs and no more than the
// history has.
#pragma once
#include "core/dispatch.h"
#include "core/host_device.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct DraftPairsParams {
    static constexpr int kMaxPairs = 64;  // as many as a word has bits

    const void* taps;            // [B, N, H]
    const int32_t* path;         // [B, D]
    const int32_t* num_path;     // [B]
    const int32_t* history;      // [B, T]
    const int32_t* history_len;  // [B]
    void* features;              // [B, P, H], in and out
    int32_t* tokens;             // [P, B]
    int32_t* source;             // [B]
    int32_t* kv_len;             // [B]; if pairs are kept in, else out
    int32_t* kv_len_after;       // [B]
    int32_t* num_earlier;        // [B]
    int64_t* bits;               // [B, W]
    int64_t taps_stride[2], features_stride[2];
    int64_t path_stride, history_stride, tokens_stride, bits_stride, width;
    int32_t batch, nodes, path_size, room, pairs, words;  // B, N, D, T, P, W
    DType dtype;
    bool are_kept;
};

// The pairs of one sequence that wait.
struct WaitingPairs {
    int32_t start;      // the first one's position, and pairs that the drafter has run
    int32_t end;        // behind the last one: the place of the history's last token, or 0
    int32_t count;      // end - start
    int32_t first_new;  // of them, the first whose feature lies in the taps
};

SPECRT_HD int32_t clamped_count(int64_t x, int32_t least, int32_t most) {
    return x < least ? least : x > most ? most : static_cast<int32_t>(x);
}

SPECRT_HD WaitingPairs waiting_pairs(const DraftPairsParams& p, int64_t seq) {
    const int32_t end = clamped_count(int64_t{p.history_len[seq]} - 1, 0, p.room - 1);
    const int32_t most = end < p.pairs ? end : p.pairs;
    const int32_t taken =
        clamped_count(p.num_path[seq], 0, most < p.path_size ? most : p.path_size);
    const int32_t newest = end - taken;
    const int32_t start = p.are_kept ? clamped_count(p.kv_len[seq], end - most, newest) : newest;
    return {start, end, end - start, newest - start};
}

// The node whose feature pair `pair` has, one of the new ones.
SPECRT_HD int64_t node_of(const DraftPairsParams& p, int64_t seq, const WaitingPairs& waiting,
                          int32_t pair) {
    const int32_t node = p.path[seq * p.path_stride + pair - waiting.first_new];
    return clamped_count(node, 0, p.nodes - 1);
}

// What stands in row `row` of the tokens: the last pair's, then the earlier ones'; 0 behind them.
SPECRT_HD int32_t token_of(const DraftPairsParams& p, int64_t seq, const WaitingPairs& waiting,
                           int32_t row) {
    const int32_t* history = p.history + seq * p.history_stride;
    if (row == 0) return history[waiting.end];
    return row < waiting.count ? history[waiting.start + row] : 0;
}

// All but features and tokens.
SPECRT_HD void write_counts(const DraftPairsParams& p, int64_t seq, const WaitingPairs& waiting) {
    const int32_t earlier = waiting.count > 0 ? waiting.count - 1 : 0;
    if (!p.are_kept) p.kv_len[seq] = waiting.start;
    p.kv_len_after[seq] = waiting.end;
    p.num_earlier[seq] = earlier;
    p.source[seq] = static_cast<int32_t>(seq) * p.pairs + earlier;
    int64_t* bits = p.bits + seq * p.bits_stride;
    for (int32_t word = 1; word < p.words; ++word) bits[word] = 0;
    bits[0] = static_cast<int64_t>((uint64_t{2} << earlier) - 1);
}

SPECRT_DECLARE_CPU(draft_pairs_part)
SPECRT_DECLARE_CUDA(draft_pairs_cuda)

struct DraftPairsArgs {
    TensorView taps, path, num_path, history, history_len, features, tokens, source, kv_len,
        kv_len_after, num_earlier, bits;
    bool are_kept;
};
Launch draft_pairs(const DraftPairsArgs& args);

}  // namespace specrt
