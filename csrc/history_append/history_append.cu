// A warp has one sequence, and lane i % 32 entry i: up to four entries of each row a lane. It needs
// neither shared memory nor a block's barrier, so that any warp that has made the tokens can go on
// with them.
//
// The launch is one trip to memory and one back: whatever is read is asked for before anything is
// waited for, entries behind the accepted ones too. Which token is the first to stop is a ballot
// for each 32 of them.
//
// Hazard: all lanes read the history's length and its limit, which one lane writes: the warp's
// barrier is between. (The shim cannot show this: the ballots keep its lanes as much in step.)
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "history_append/history_append.h"

namespace specrt {
namespace {

constexpr int kEach = HistoryAppendParams::kMaxNodes / 32;  // entries of a lane

struct Entries {
    int32_t values[kEach];
};

// Those of a row of N; past its end `padding`.
__device__ __forceinline__ Entries load_entries(const int32_t* row, int lane, int nodes,
                                                int32_t padding) {
    Entries own;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        own.values[i] = lane + 32 * i < nodes ? row[lane + 32 * i] : padding;
    return own;
}

// The first `count`, and then `padding`.
__device__ __forceinline__ void report_entries(int32_t* column, const Entries& own, int lane,
                                               int count, int nodes, int32_t padding) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int entry = lane + 32 * i;
        if (entry < nodes) column[entry] = entry < count ? own.values[i] : padding;
    }
}

__device__ __forceinline__ int first_stop_of(const HistoryAppendParams& p, int64_t seq,
                                             const Entries& tokens) {
    const int32_t* stop_ids = p.stop_ids + seq * p.stop_ids_stride;
    bool stops[kEach] = {};
    for (int s = 0; s < p.stops; ++s) {
        const int32_t stop_id = stop_ids[s];
#pragma unroll
        for (int i = 0; i < kEach; ++i) stops[i] |= is_stop(tokens.values[i], stop_id);
    }
    int first = HistoryAppendParams::kMaxNodes;
#pragma unroll
    for (int i = kEach - 1; i >= 0; --i) {
        const unsigned found = __ballot_sync(kFullWarp, stops[i]);
        if (found != 0) first = 32 * i + __ffs(static_cast<int>(found)) - 1;
    }
    return first;
}

__device__ __forceinline__ int deepest_of(const Entries& depth, int lane, int num_nodes,
                                          int nodes) {
    int deepest = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        if (lane + 32 * i < num_nodes) deepest = max(deepest, depth.values[i]);
    return clamped(__reduce_max_sync(kFullWarp, deepest), 0, nodes - 1);
}

// Behind the history, and what goes with it. All lanes of the warp must call.
__device__ __forceinline__ void append(const HistoryAppendParams& p, int64_t seq, int lane,
                                       const Accepted& a, const Entries& tokens, int taken) {
    int32_t* end = p.history + seq * p.history_stride + a.length;
    __syncwarp(kFullWarp);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int entry = lane + 32 * i;
        if (entry < taken) end[entry] = tokens.values[i];
        if (entry == taken - 1) {
            p.history_len[seq] = a.length + taken;
            p.roots[seq] = tokens.values[i];
        }
    }
    if (lane == 0) p.num_path[seq] = taken;
}

// One sequence by one warp.
__device__ __forceinline__ void finish_sequence(const HistoryAppendParams& p, int64_t seq,
                                                int lane) {
    const Accepted a = accepted_of(p, seq);
    const auto load = [&](const int32_t* rows, int64_t stride) {
        return load_entries(rows + seq * stride, lane, p.nodes, kNoToken);
    };
    const Entries tokens = load(p.tokens, p.tokens_stride), path = load(p.path, p.path_stride),
                  depth = load(p.depth, p.depth_stride);
    Entries logprobs{};
    if (p.logprobs != nullptr) logprobs = load(p.logprobs, p.logprobs_stride);
    const int first_stop = first_stop_of(p, seq, tokens), taken = num_taken(a, first_stop);
    const int deepest = deepest_of(depth, lane, a.num_nodes, p.nodes);
    append(p, seq, lane, a, tokens, taken);
    int32_t* row = p.report + seq * p.report_stride;
    const int32_t ending = ending_of(a, taken, first_stop);
    if (lane == 0) {
        write_header(row, a, deepest, taken, ending);
        if (ending != 0) p.max_len[seq] = 0;
    }
    row += kReportHeaderSize;
    report_entries(row, tokens, lane, a.count, p.nodes, kNoToken);
    report_entries(row + p.nodes, path, lane, a.count, p.nodes, kNoToken);
    if (p.logprobs != nullptr)
        report_entries(row + 2 * p.nodes, logprobs, lane, a.count, p.nodes, kNoLogprob);
}

__global__ void __launch_bounds__(32) history_append_sequence(const HistoryAppendParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    finish_sequence(p, blockIdx.x, static_cast<int>(threadIdx.x));
}

}  // namespace

void history_append_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const HistoryAppendParams*>(params);
    if (p.batch == 0) return;
    const LaunchShape shape{dim3(static_cast<unsigned>(p.batch)), dim3(32), 0, kOverlaps};
    SPECRT_LAUNCH(history_append_sequence, shape, stream, p);
}

}  // namespace specrt
