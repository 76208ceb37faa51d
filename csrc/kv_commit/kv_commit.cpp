#include "kv_commit/kv_commit.h"

namespace specrt {

KvCommit kv_commit(const TensorView& kv, const TensorView& block_table, const TensorView& path,
                   const TensorView& num_path, const TensorView& kv_len, const TensorView& tickets,
                   bool is_last) {
    expect_float(kv);
    expect(kv, kv.dtype, "[L, 2, P, page_size, Hkv, d]", -1, 2, -1, -1, -1, -1);
    expect_contiguous(kv);
    expect(path, DType::kInt32, "[B, D]", -1, -1);
    const int64_t seqs = path.shape[0];
    KvCommitParams p{};
    p.kv = kv.as<unsigned char>();
    p.path = path.as<int32_t>();
    p.num_path = expect_counts(num_path, seqs);
    expect_counts(kv_len, seqs);
    p.kv_len = kv_len.as<int32_t>();
    p.table = page_table(block_table, seqs, kv.shape[2], kv.shape[3]);
    p.path_stride = path.stride[0];
    p.row_bytes = kv.shape[4] * kv.shape[5] * size_of(kv.dtype);
    p.plane_bytes = kv.shape[2] * kv.shape[3] * p.row_bytes;
    p.num_seqs = static_cast<int32_t>(seqs);
    p.num_planes = static_cast<int32_t>(2 * kv.shape[0]);
    p.max_path = static_cast<int32_t>(path.shape[1]);
    p.is_last = is_last;
    const int device = common_device(kv, block_table, path, num_path, kv_len);
    if (device != kCpu) {
        common_device(kv, tickets);
        expect(tickets, DType::kInt32, "[B]", seqs);
        p.tickets = tickets.as<unsigned>();
        return {{make_cuda_launch(kv_commit_cuda, p, device)}, 1};
    }
    const int64_t parts = 1 + seqs * p.max_path * p.num_planes * p.row_bytes / 32768;
    const Isa isa = active_isa();
    return {
        {make_launch(kv_commit_move_part_for(isa), p, parts < p.num_planes ? parts : p.num_planes),
         make_launch(kv_commit_advance_part_for(isa), p, 1)},
        is_last ? 2 : 1};
}

}  // namespace specrt
