// A thread owns one column of one plane (a layer's keys or values) and moves it row by row, in
// increasing j: path[j] >= j, so nothing lands on a row that is still to be read, and nobody else
// touches the column. Of a path that does not increase the rows mean nothing.
//
//     slot from kv_len on   0   1   2   3   4   5        path 0 2 5
//     before                a   b   c   d   e   f
//     after                 a   c   f   d   e   f        what is past the new length is nobody's
//
// Rows are held by eights: all eight loads are under way before the first store waits for one. The
// next eight lie at path[j] >= j, behind everything the eight before them wrote.
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "kv_commit/kv_commit.h"

namespace specrt {
namespace {

constexpr int kBlock = 128;
constexpr int kBatch = 8;  // rows a thread holds: all are read, then all written

__device__ __forceinline__ void read_nodes(const KvCommitParams& p, int seq, int first,
                                           int (&nodes)[kBatch]) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        const int j = first + i < p.max_path ? first + i : p.max_path - 1;
        nodes[i] = p.path[seq * p.path_stride + j];
    }
}

// Rows first .. first + kBatch - 1 of the path, those of them that have to move.
template <typename Column>
__device__ __forceinline__ void move_batch(const KvCommitParams& p, int seq, unsigned char* column,
                                           int first, int end, const int (&nodes)[kBatch]) {
    const unsigned length = p.kv_len[seq];
    const auto at = [&](unsigned slot) {
        return reinterpret_cast<Column*>(column + row_of_slot(p.table, seq, slot) * p.row_bytes);
    };
    const auto moves = [&](int i) {
        return first + i < end && nodes[i] != first + i && has_slot(p.table, length + first + i) &&
               has_slot(p.table, length + nodes[i]);
    };
    Column held[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
        if (moves(i)) held[i] = *at(length + nodes[i]);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
        if (moves(i)) *at(length + first + i) = held[i];
}

template <typename Column>
__global__ void __launch_bounds__(kBlock)
    kv_commit_columns(const KvCommitParams p, const unsigned blocks_per_seq,
                      const unsigned columns) {
    ptx::let_next_start();
    SPECRT_SHARED(int, flag);
    const int seq = static_cast<int>(blockIdx.x / blocks_per_seq);
    const unsigned number = blockIdx.x % blocks_per_seq * kBlock + threadIdx.x;
    const unsigned plane = number / columns;
    ptx::wait_for_previous();
    const int length = p.kv_len[seq], wanted = p.num_path[seq];
    const int count = wanted < p.max_path ? wanted : p.max_path;
    int nodes[kBatch];
    read_nodes(p, seq, 0, nodes);  // beside the counts: one wait, not two
    if (count <= 0) return;        // as do all blocks of the sequence, so no ticket is drawn
    if (plane < static_cast<unsigned>(p.num_planes)) {
        unsigned char* column = p.kv + plane * p.plane_bytes + number % columns * sizeof(Column);
        move_batch<Column>(p, seq, column, 0, count, nodes);
        for (int first = kBatch; first < count; first += kBatch) {
            read_nodes(p, seq, first, nodes);
            move_batch<Column>(p, seq, column, first, count, nodes);
        }
    }
    if (!p.is_last) return;
    if (is_last_block(p.tickets + seq, blocks_per_seq, &flag) && threadIdx.x == 0)
        p.kv_len[seq] = advanced(length, count);
}

template <typename Column>
void launch(const KvCommitParams& p, CudaStream stream) {
    const int64_t columns = p.row_bytes / static_cast<int64_t>(sizeof(Column));
    const unsigned blocks = ceil_div(p.num_planes * columns, kBlock);
    const unsigned blocks_per_seq = blocks > 0 ? blocks : 1;  // the lengths are advanced anyway
    const LaunchShape shape{dim3(static_cast<unsigned>(p.num_seqs) * blocks_per_seq), dim3(kBlock),
                            0, kOverlaps};
    const unsigned per_row = columns > 0 ? static_cast<unsigned>(columns) : 1;
    SPECRT_LAUNCH(kv_commit_columns<Column>, shape, stream, p, blocks_per_seq, per_row);
}

}  // namespace

void kv_commit_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const KvCommitParams*>(params);
    if (p.num_seqs == 0 || p.max_path == 0) return;
    const bool has_16_bytes = is_multiple_of_16(p.kv) && is_multiple_of_16(p.row_bytes);
    if (has_16_bytes) return launch<Pack<uint32_t, 4>>(p, stream);
    launch<uint16_t>(p, stream);
}

}  // namespace specrt
