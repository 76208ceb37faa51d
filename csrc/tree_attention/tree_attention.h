// Attention of tree nodes over the paged prefix and, by bit mask, their ancestors.
//
// A row's visible keys, the prefix (with a window its first slots, the sinks, and its last ones)
// and then its ancestors from the root down, are numbered 0, 1, 2, ... as if they were one
// sequence. Key p belongs to leaf p / 64. Each leaf is reduced on its own (max, exponentials, their
// sum, weighted values), and leaves are merged left to right. All orders follow from those numbers
// alone, so verifying a token in a tree and decoding it after its ancestors were committed give the
// same bits. With a sliding window a row sees the last so many of its keys, which keep their
// numbers: leaves before them are passed over, and their first leaf may lack its beginning.
#pragma once
#include "core/dispatch.h"
#include "core/open.h"
#include "core/paged.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

// How a launch on a GPU is laid out; 0: as was measured (variants.h), else by make_plan's rules.
// Every choice gives the same bits.
struct PlanChoice {
    int32_t num_warps;      // of a block, each with 16 rows: 4 or 8
    int32_t blocks_per_sm;  // sequences are split until every SM has so many, if they are that long
};

constexpr bool is_valid(const PlanChoice& plan) {
    const int warps = plan.num_warps, blocks = plan.blocks_per_sm;
    return (warps == 0 || warps == 4 || warps == 8) && blocks >= 0 && blocks <= 16;
}

struct TreeAttentionArgs {
    TensorView q, k_cache, v_cache, block_table, kv_len, first_node, num_nodes, ancestors, out,
        workspace;
    TensorView k, v, depth, cos_sin;  // all or none: keys and values still to be appended
    float scale;
    PlanChoice plan;
    int64_t window, num_sinks;  // slots of the prefix that are seen; no window: 0, all
    TensorView is_open;         // or none
    int64_t sliding_window;     // keys that a row sees, the last ones; 0: all
    float cap;                  // scaled scores s become cap * tanh(s / cap); 0: s
};

// On a GPU q and the tree's keys may come before their rotation, as rope_append gets them; they are
// rotated here, and keys and values appended.
struct AppendParams {
    const void *k, *v;     // [B, N, Hkv, d]; nullptr: nothing to append
    const int32_t* depth;  // [B, N]
    const float* cos_sin;  // [max_positions, d]: cosines of d / 2 angles, then sines
    int64_t k_stride[3], v_stride[3], depth_stride;
    int32_t max_positions;
};

struct TreeAttentionParams {
    static constexpr int kMaxWords = 2;  // trees of at most 128 nodes
    const void* q;                       // [B, N, Hq, d]
    void *k_cache, *v_cache;             // [P, page_size, Hkv, d]
    const int32_t *kv_len, *first_node, *num_nodes;
    const uint64_t* ancestors;  // [B, N, W]
    void* out;                  // [B, N, Hq, d]
    void* workspace;            // on a GPU: tickets, zero between launches, and scratch
    PageTable table;
    AppendParams append;
    int64_t q_stride[3], out_stride[3], ancestors_stride[2];
    int32_t num_seqs, num_nodes_max, num_kv_heads, group, head_dim, num_words;  // group: Hq / Hkv
    // Of a longer prefix than max_seen the first num_sinks slots are seen and the last of the rest.
    int32_t num_sinks, max_seen;
    float scale;
    DType q_dtype, cache_dtype;  // out's is q's
    PlanChoice plan;
    const int32_t* is_open;  // [B], or nullptr
    int32_t sliding_window;  // kMaxSlots: none
    float cap;               // or 0
};

SPECRT_DECLARE_CPU(tree_attention_part)
SPECRT_DECLARE_CUDA(tree_attention_cuda)

namespace attention {
struct Shape {
    int num_seqs, num_kv_heads, group, num_nodes, head_dim;
    int64_t max_len;  // of the longest prefix there may be, as far as a drafter's window shows it
    int sliding_window = kMaxSlots;  // none

    constexpr int64_t max_seen() const {  // keys of the prefix that a row sees
        return max_len < sliding_window ? max_len : sliding_window;
    }

    constexpr int rows() const { return num_nodes * group; }  // of a sequence and KV head
    constexpr int64_t pairs() const { return int64_t{num_seqs} * num_kv_heads; }
};

inline Shape shape_of(const TreeAttentionParams& p) {
    const int64_t slots = int64_t{p.table.max_pages} * p.table.page_size;
    return {p.num_seqs,      p.num_kv_heads, p.group,
            p.num_nodes_max, p.head_dim,     slots < p.max_seen ? slots : p.max_seen,
            p.sliding_window};
}
}  // namespace attention

// Floats of workspace that launches of this shape and plan need on a GPU (kCpu: the current one).
// Tickets at its beginning are to be zeroed once.
#if defined(SPECRT_CUDA_KERNELS)
int64_t tree_attention_workspace(int device, const attention::Shape& shape, const PlanChoice& plan);
#else
inline int64_t tree_attention_workspace(int, const attention::Shape&, const PlanChoice&) {
    return 0;
}
#endif

void expect_plan(const PlanChoice& plan);

// As parameters have it; 0 is none.
int32_t clamped_window(int64_t sliding_window);

Launch tree_attention(const TreeAttentionArgs& args);

}  // namespace specrt
