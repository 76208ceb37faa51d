// The longest agreed path of a draft tree, and the target's own token behind it.
//
// Per sequence, from the root down: draw the target's token at the node (greedy, or seeded by the
// token's absolute position); descend into the child that holds it, else stop: it is the bonus
// token. With draft_probs and temperature > 0: rejection with residuals over the children. On a
// CPU only the logits of nodes on the path are read; a GPU draws for all nodes at once.
//
// With logit_rows [B, N], logits are [R, V], and node j of sequence b has row logit_rows[b, j], or
// none (any other number). A walk stops at a node that has none and names it in next_node[b], where
// it is to go on; -1: it has ended. A first call finds zeros there.
#pragma once
#include <vector>

#include "core/dispatch.h"
#include "core/philox.h"
#include "core/sampling_row.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

// Needs nothing but the logits as they are: no workspace.
SPECRT_HD bool is_plain_greedy(const SamplingRow& row) {
    return row.temperature == 0.0f && row.repetition_penalty == 1.0f &&
           row.presence_penalty == 0.0f && row.frequency_penalty == 0.0f &&
           row.bias_begin == row.bias_end;
}

// A row of a large vocabulary is read by all threads, in slices of so many tokens or more; one
// thread is done with a smaller one before a second could have started.
constexpr int64_t kRowSliceTokens = 8192;
constexpr int64_t kLeastSharedVocab = 4 * kRowSliceTokens;
constexpr int kMostRowSlices = 16;
constexpr int num_row_slices(int64_t vocab) {
    return vocab < kMostRowSlices * kRowSliceTokens ? static_cast<int>(vocab / kRowSliceTokens)
                                                    : kMostRowSlices;
}

// Of a CPU's walk in several launches.
enum class WalkStage : int32_t { kBegin, kGoOn, kEnd };

struct TreeAcceptParams {
    const int32_t* draft_tokens;  // [B, N]
    const int32_t* parents;       // [B, N]
    const int32_t* num_nodes;     // [B]
    const float* draft_probs;     // [B, N, V] or nullptr
    const float* logits;          // [B, N, V]
    const SamplingRow* sampling;  // [B]
    const int32_t* bias_ids;      // [K] or nullptr
    const float* bias_values;     // [K] or nullptr
    const int32_t* history;       // [B, T]
    const int32_t* history_len;   // [B]
    int32_t* path;                // [B, P]
    int32_t* accept_length;       // [B]
    int32_t* tokens;              // [B, P]
    float* logprobs;              // [B, P] or nullptr
    float* workspace;             // [parts, tree_accept_workspace(V)] or nullptr; GPU: never
    const uint64_t* maxima;       // GPU: [B, N, num_token_tiles(V)] or nullptr
    int64_t logits_stride[2], probs_stride[2], history_stride;
    int64_t batch, nodes, vocab, path_size, history_size, num_bias;
    const int32_t* logit_rows;  // CPU: [B, N] or nullptr
    int32_t* next_node;         // CPU: [B], with logit_rows
    int64_t num_logit_rows;
    WalkStage stage;
};

// Floats of scratch a walk needs, unless every sequence is greedy without bias or penalties.
constexpr int64_t kWalkStateFloats = 33 * 1024;
constexpr int64_t tree_accept_workspace(int64_t vocab) {
    return 8 * ((vocab + 63) / 64 * 64) + kWalkStateFloats;
}

// How many of them `batch` walks use: one each where threads share rows, else one a thread.
constexpr int64_t tree_accept_parts(int64_t batch, int64_t vocab, int64_t num_threads) {
    return vocab >= kLeastSharedVocab || batch < num_threads ? batch : num_threads;
}

// Floats of a launch's workspace on a GPU, of any contents but for the first call's: zeros.
int64_t tree_accept_gpu_workspace(int64_t batch, int64_t nodes, int64_t vocab,
                                  bool has_draft_probs);

SPECRT_DECLARE_CPU(tree_accept_part)
SPECRT_DECLARE_CPU(tree_accept_step_part)
SPECRT_DECLARE_CPU(tree_accept_slice_part)
SPECRT_DECLARE_CUDA(tree_accept_cuda)
// For tests: logprobs is [B, V] and gets the root's processed logits, -inf where filtered out.
SPECRT_DECLARE_CPU(processed_logits_part)

// For tests: core/simd.h's exponentials, and core/mass_lanes.h's masses, of any floats.
struct ExponentialsParams {
    const float* x;    // [n]
    float* exps;       // [n]
    uint64_t* masses;  // [n]
    int64_t count;
};
SPECRT_DECLARE_CPU(exponentials_part)

struct TreeAcceptArgs {
    TensorView draft_tokens, parents, num_nodes, draft_probs, logits, sampling, bias_ids,
        bias_values, history, history_len, path, accept_length, tokens, logprobs, workspace, maxima,
        logit_rows, next_node;
};
// In order; one, but for large vocabularies on a CPU.
std::vector<Launch> tree_accept(const TreeAcceptArgs& args);
Launch processed_logits(const TreeAcceptArgs& args, const TensorView& out);
Launch exponentials(const TensorView& x, const TensorView& exps, const TensorView& masses);

}  // namespace specrt
