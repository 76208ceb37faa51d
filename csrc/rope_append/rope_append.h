// Rotary embedding of a tree's queries and keys, and the append of its keys and values to the
// cache.
#pragma once
#include "core/dispatch.h"
#include "core/paged.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct RopeAppendArgs {
    TensorView q, k, v, depth, kv_len, first_node, num_nodes, block_table, cos_sin, k_cache,
        v_cache;
};

struct RopeAppendParams {
    void* q;            // [B, N, Hq, d], roped in place
    const void *k, *v;  // [B, N, Hkv, d]
    const int32_t *depth, *kv_len, *first_node, *num_nodes;
    const float* cos_sin;  // [max_positions, d]: cosines of d / 2 angles, then sines
    void *k_cache, *v_cache;
    PageTable table;
    int64_t q_stride[3], k_stride[3], v_stride[3], depth_stride;
    int32_t num_seqs, num_rows, num_heads, num_kv_heads, head_dim, max_positions;
    DType dtype, cache_dtype;  // of q, k and v, and of the caches
};

// The position whose angles a row takes. A node past the context limit is never accepted; the clamp
// only keeps its read in bounds.
SPECRT_HD int64_t known_position(const RopeAppendParams& p, int seq, int row) {
    const uint32_t length = static_cast<uint32_t>(p.kv_len[seq]);
    const uint32_t depth = static_cast<uint32_t>(p.depth[seq * p.depth_stride + row]);
    return clamp_index(length + depth, p.max_positions);
}

SPECRT_HD uint32_t slot_of(const RopeAppendParams& p, int seq, int row) {
    return static_cast<uint32_t>(p.kv_len[seq]) + static_cast<uint32_t>(p.first_node[seq]) +
           static_cast<uint32_t>(row);
}

SPECRT_DECLARE_CPU(rope_append_part)
SPECRT_DECLARE_CUDA(rope_append_cuda)

Launch rope_append(const RopeAppendArgs& args);

}  // namespace specrt
