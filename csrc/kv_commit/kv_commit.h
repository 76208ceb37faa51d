// Accepted rows into place, in every layer, then, of the last cache, the lengths: no part may see a
// new length while another still moves rows by the old one. So two launches on the CPU; on a GPU
// one, whose last block of a sequence to come knows that all others have read the old length.
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
    int32_t* kv_len;    // [B], in and out
    unsigned* tickets;  // [B], 0 before and after; on a GPU
    PageTable table;
    int64_t path_stride, row_bytes, plane_bytes;  // a plane: one layer's keys or values
    int32_t num_seqs, num_planes, max_path;
    bool is_last;  // of the caches that hold these rows: then the lengths are advanced
};

// Modulo 2^32: what is no length may overflow.
SPECRT_HD int32_t advanced(int32_t length, int32_t count) {
    return static_cast<int32_t>(static_cast<uint32_t>(length) + static_cast<uint32_t>(count));
}

SPECRT_DECLARE_CPU(kv_commit_move_part)
SPECRT_DECLARE_CPU(kv_commit_advance_part)
SPECRT_DECLARE_CUDA(kv_commit_cuda)

struct KvCommit {
    Launch launches[2];  // to be submitted in this order
    int count;
};

KvCommit kv_commit(const TensorView& kv, const TensorView& block_table, const TensorView& path,
                   const TensorView& num_path, const TensorView& kv_len, const TensorView& tickets,
                   bool is_last);

}  // namespace specrt
