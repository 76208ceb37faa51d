// path is strictly increasing, so path[j] >= j: in increasing j a row is read before anything lands
// on it, and the move is safe in place.
#include "core/simd.h"
#include "kv_commit/kv_commit.h"

namespace specrt::SPECRT_ISA {
namespace {

int num_committed(const KvCommitParams& p, int seq) {
    const int count = p.num_path[seq];
    return count < p.max_path ? count : p.max_path;
}

unsigned char* row_at(const KvCommitParams& p, unsigned char* plane, int seq, int64_t slot) {
    const int64_t page = p.table.pages[seq * p.table.stride + slot / p.table.page_size];
    return plane + (page * p.table.page_size + slot % p.table.page_size) * p.row_bytes;
}

void move_rows(const KvCommitParams& p, unsigned char* plane, int seq) {
    const int32_t* path = p.path + seq * p.path_stride;
    const int count = num_committed(p, seq);
    const int64_t length = p.kv_len[seq];
    for (int j = 0; j < count; ++j) {
        if (path[j] == j) continue;  // already in place
        std::memcpy(row_at(p, plane, seq, length + j), row_at(p, plane, seq, length + path[j]),
                    static_cast<size_t>(p.row_bytes));
    }
}

}  // namespace

void kv_commit_move_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const KvCommitParams*>(params);
    const int end = p.num_planes * (part + 1) / num_parts;
    for (int plane = p.num_planes * part / num_parts; plane < end; ++plane)
        for (int seq = 0; seq < p.num_seqs; ++seq) move_rows(p, p.kv + plane * p.plane_bytes, seq);
}

void kv_commit_advance_part(const void* params, int, int) {
    const auto& p = *static_cast<const KvCommitParams*>(params);
    for (int seq = 0; seq < p.num_seqs; ++seq) {
        const int count = num_committed(p, seq);
        if (count > 0) p.kv_len[seq] += count;
    }
}

}  // namespace specrt::SPECRT_ISA
