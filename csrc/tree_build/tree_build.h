// The dynamic draft tree (EAGLE-2, spec/fspad.md): tree_expand scores one level's children and
// picks the next frontier, tree_rerank keeps the best of all children as a tree.
//
// The pool holds every child: level 0's K, then K * K a level, grouped by frontier node. A child
// never scores above its parent and comes later in the pool, so the best-first order that both
// functions use puts parents before children.
//
//     K = 2      0   1  |  2   3   4   5  |  6   7   8   9
//     level      0      |  1              |  2
//     parents    -1  -1 |  1   1   0   0  |  2   2   4   4
//     frontier   1 0    |  2 4            |                  best first: 1 scores above 0
//
// Groups of a level are in the frontier's order, so a group's parent is known by its place.
//
// Order everywhere: larger score first, then the lower index; NaN after everything.
#pragma once
#include "core/dispatch.h"
#include "core/sampling_row.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

constexpr int kMaxTopK = 128;
constexpr int kMaxNodes = 128;

struct TreeExpandParams {
    const float* logits;          // [B, F, R]
    const float* scores;          // [B, F]
    const int32_t* candidates;    // [B, F] pool indices
    const int64_t* ancestors;     // [B, F, W]
    const int32_t* token_map;     // [R] or nullptr
    const SamplingRow* sampling;  // [B], or nullptr: plain ranking, as of temperature 0
    const int32_t* position;      // [B]: where in the sequence the level-0 children would stand
    const int32_t* is_open;       // [B] 0: closed; nullptr: all are open
    int32_t* pool_tokens;         // [B, C]
    int32_t* pool_parents;        // [B, C]
    float* pool_scores;           // [B, C]
    int32_t* frontier_tokens;     // [B, K]
    float* frontier_scores;
    int32_t* frontier_candidates;
    int32_t* frontier_source;
    int64_t* frontier_ancestors;  // [B, K, W]
    float* level_score;           // [B] or nullptr
    uint64_t* keys;               // [B * F, tiles] on a GPU: core/tile_maxima.h; or nullptr
    float* masses;                // [B * F, tiles]
    float* workspace;             // [parts, tree_expand_workspace(R)]; on a GPU [workspace_size]
    int64_t workspace_size;
    int64_t logits_stride[2];
    float noise_scale_temperature;
    int32_t batch, width, rows, top_k, pool_size, words, level;  // width: F, rows: R
};

// Floats of scratch a part needs.
constexpr int64_t tree_expand_workspace(int64_t rows) {
    return 6 * ((rows + 63) / 64 * 64);
}

// A GPU's workspace, in words of 4 bytes. What is at its end is 0 between launches: a smaller batch
// or level than it was made for finds zeros there, wherever it looks.
//
//     | keys of tiles | their masses | ...    ... | filters' weights | tickets |
constexpr int64_t kSliceTokens = 4096;  // of a row that several blocks of threads share
constexpr int64_t kDistances = 256;     // from a row's best, for which its filter adds up weights

constexpr int64_t expand_slices(int64_t rows) {
    return (rows + kSliceTokens - 1) / kSliceTokens;
}
constexpr int64_t expand_zero_words(int64_t batch, int64_t top_k) {
    return batch * top_k * 2 * kDistances + batch * (1 + top_k) + 1;
}
constexpr int64_t tree_expand_gpu_workspace(int64_t batch, int64_t width, int64_t rows,
                                            int64_t top_k) {
    return batch * width * 3 * ((rows + 63) / 64) + expand_zero_words(batch, top_k);
}

SPECRT_DECLARE_CPU(tree_expand_children_part)
SPECRT_DECLARE_CPU(tree_expand_frontier_part)
SPECRT_DECLARE_CUDA(tree_expand_cuda)

struct TreeExpandArgs {
    TensorView logits, scores, candidates, ancestors, token_map, sampling, position, pool_tokens,
        pool_parents, pool_scores, frontier_tokens, frontier_scores, frontier_candidates,
        frontier_source, frontier_ancestors, workspace, is_open, level_score, keys, masses;
    float noise_scale_temperature;
    int64_t level;
};
struct TreeExpand {
    Launch children;
    Launch frontier;  // on a CPU, after the children; a GPU's only launch is `children`
};
TreeExpand tree_expand(const TreeExpandArgs& args);

struct TreeRerankParams {
    const int32_t* pool_tokens;   // [B, C]
    const int32_t* pool_parents;  // [B, C]
    const float* pool_scores;     // [B, C]
    const int32_t* roots;         // [B]
    int32_t* draft_tokens;        // [B, N]
    int32_t* parents;             // [B, N]
    int32_t* num_nodes;           // [B]
    float* node_scores;           // [B, N]
    int32_t batch, nodes, pool_size, num_candidates;
};

SPECRT_DECLARE_CPU(tree_rerank_part)
SPECRT_DECLARE_CUDA(tree_rerank_cuda)

struct TreeRerankArgs {
    TensorView pool_tokens, pool_parents, pool_scores, roots, draft_tokens, parents, num_nodes,
        node_scores;
    int64_t num_candidates;
};
Launch tree_rerank(const TreeRerankArgs& args);

}  // namespace specrt
