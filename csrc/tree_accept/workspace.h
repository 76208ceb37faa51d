// How rows are split among a GPU's blocks, and the memory in which their parts meet.
//
// A row's tokens are numbered in chunks, a slice is some chunks in a row, and a block has one
// slice. How many slices a row has follows from the shapes alone, so the workspace has one size for
// all GPUs; sums are of integers and the rest are maxima, so no result depends on it.
#pragma once
#include "core/host_device.h"
#include "tree_accept/tree_accept.h"

namespace specrt {

constexpr int kAcceptThreads = 512;
constexpr int kTokensAThread = 16;                       // of a chunk
constexpr int kChunk = kTokensAThread * kAcceptThreads;  // whole blocks of noise
constexpr int kMostAcceptNodes = 128;                    // of a tree on a GPU
constexpr int kMassBins = 1024;                          // by distance from the row's maximum,
constexpr float kBinsPerUnit = 32.0f;                    // so that no mass is below the last
constexpr int kCandidates = 2048;                        // of a row, to be sorted
constexpr int64_t kWantedBlocks = 264;                   // two on each SM of an H100

struct RowSplit {
    int64_t num_chunks, slice_chunks, num_slices;
};

SPECRT_HD RowSplit split_rows(int64_t num_rows, int64_t vocab) {
    RowSplit split;
    split.num_chunks = (vocab + kChunk - 1) / kChunk;
    int64_t wanted = num_rows < 1 ? 1 : kWantedBlocks / num_rows;
    wanted = wanted < 1 ? 1 : wanted < split.num_chunks ? wanted : split.num_chunks;
    split.slice_chunks = (split.num_chunks + wanted - 1) / wanted;
    split.num_slices = (split.num_chunks + split.slice_chunks - 1) / split.slice_chunks;
    return split;
}

// What a block found in its slice of a row.
struct SlicePart {
    uint64_t best;      // key of the maximum, or of the drawn token with its score
    uint64_t drawn;     // key of the best score among the kept
    uint64_t raw_mass;  // of the logits as they are
    uint32_t raw_top;   // their maximum, in ordered bits
    int32_t is_bad;     // NaN or +inf
};

// What is known of a row. Kept are tokens above `cut` and of those equal to it the ids up to
// `cut_id`; until that is known, those in bins before first_bin, and some in first_bin..last_bin.
struct RowState {
    uint64_t total;   // mass of what top_p chooses from, if top_k is off
    uint64_t before;  // mass in bins before first_bin
    uint64_t raw_total;
    float top, raw_top, cut;
    int32_t cut_id, first_bin, last_bin;  // no bin: the cut is known
    int32_t top_k;                        // 0: keeps all there are
    int32_t token;                        // -1: none can be drawn
};

// In this order; only the first three must be 0 before a call, and are again after it.
struct AcceptWorkspace {
    uint32_t* row_tickets;     // [R]
    uint32_t* num_candidates;  // [R]
    uint32_t* tree_tickets;    // [B]
    SlicePart* parts;          // [R, S]
    RowState* states;          // [R]
    uint64_t* bin_masses;      // [R, S, kMassBins]
    uint32_t* bin_counts;      // [R, S, kMassBins]
    uint64_t* candidates;      // [R, min(V, kCandidates)], keys
    uint64_t* residual;        // [B, V] with draft_probs: masses of a row
    int64_t num_bytes;
};

SPECRT_HD int64_t most_candidates(int64_t vocab) {
    return vocab < kCandidates ? vocab : kCandidates;
}

SPECRT_HD AcceptWorkspace accept_workspace(void* base, int64_t batch, int64_t nodes, int64_t vocab,
                                           bool has_draft_probs) {
    const int64_t rows = batch * nodes, slices = rows * split_rows(rows, vocab).num_slices;
    unsigned char* at = static_cast<unsigned char*>(base);
    const auto take = [&at](int64_t bytes) {
        unsigned char* begin = at;
        at += (bytes + 15) / 16 * 16;
        return begin;
    };
    AcceptWorkspace w;
    w.row_tickets = reinterpret_cast<uint32_t*>(take(4 * rows));
    w.num_candidates = reinterpret_cast<uint32_t*>(take(4 * rows));
    w.tree_tickets = reinterpret_cast<uint32_t*>(take(4 * batch));
    w.parts = reinterpret_cast<SlicePart*>(take(sizeof(SlicePart) * slices));
    w.states = reinterpret_cast<RowState*>(take(sizeof(RowState) * rows));
    w.bin_masses = reinterpret_cast<uint64_t*>(take(8 * slices * kMassBins));
    w.bin_counts = reinterpret_cast<uint32_t*>(take(4 * slices * kMassBins));
    w.candidates = reinterpret_cast<uint64_t*>(take(8 * rows * most_candidates(vocab)));
    w.residual = reinterpret_cast<uint64_t*>(take(has_draft_probs ? 8 * batch * vocab : 0));
    w.num_bytes = at - static_cast<unsigned char*>(base);
    return w;
}

}  // namespace specrt
