// Accepted rows into place, in every layer, then the lengths. Two launches: no part may see a new
// length while another still moves rows by the old one.
#pragma once
#include "core/dispatch.h"
#include "core/paged.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct KvCommitParams {
    unsigned char* kv;    // [L, 2, P, page_size, row_bytes]
    const int32_t* path;  // [B, D], strictly increasing node indices
    const int32_t* num_path;
    int32_t* kv_len;  // [B], in and out
    PageTable table;
    int64_t path_stride, row_bytes, plane_bytes;  // a plane: one layer's keys or values
    int32_t num_seqs, num_planes, max_path;
};

SPECRT_DECLARE_CPU(kv_commit_move_part)
SPECRT_DECLARE_CPU(kv_commit_advance_part)

struct KvCommit {
    Launch move, advance;  // to be submitted in this order
};

KvCommit kv_commit(const TensorView& kv, const TensorView& block_table, const TensorView& path,
                   const TensorView& num_path, const TensorView& kv_len);

}  // namespace specrt
