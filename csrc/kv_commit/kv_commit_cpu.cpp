// path is strictly increasing, so path[j] >= j: in increasing j a row is read before anything lands
// on it, and the move is safe in place. Of any other path the rows mean nothing.
#include "core/simd.h"
#include "kv_commit/kv_commit.h"

namespace specrt::SPECRT_ISA {
namespace {

int num_committed(const KvCommitParams& p, int seq) {
    const int count = p.num_path[seq];
    return count < p.max_path ? count : p.max_path;
}

unsigned char* row_at(const KvCommitParams& p, unsigned char* plane, int seq, uint32_t slot) {
    return plane + row_of_slot(p.table, seq, slot) * p.row_bytes;
}

void move_rows(const KvCommitParams& p, unsigned char* plane, int seq) {
    const int32_t* path = p.path + seq * p.path_stride;
    const int count = num_committed(p, seq);
    const uint32_t length = static_cast<uint32_t>(p.kv_len[seq]);
    for (int j = 0; j < count; ++j) {
        if (path[j] == j) continue;  // already in place
        const uint32_t to = length + static_cast<uint32_t>(j);
        const uint32_t from = length + static_cast<uint32_t>(path[j]);
        if (!has_slot(p.table, to) || !has_slot(p.table, from)) continue;
        std::memmove(row_at(p, plane, seq, to), row_at(p, plane, seq, from),
                     static_cast<size_t>(p.row_bytes));  // two slots may be one row
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
        if (count > 0) p.kv_len[seq] = advanced(p.kv_len[seq], count);
    }
}

}  // namespace specrt::SPECRT_ISA
