// A row of the draft head's logits as a GPU's blocks of threads share it: in slices, each of which
// is 64 blocks of 64 tokens and one block of threads.
#pragma once
#include "core/launch.cuh"
#include "core/score_key.h"
#include "tree_build/level.h"

namespace specrt {

constexpr int kTokens = 64;  // of a block: sixteen counters' noise (core/philox.h)
constexpr int kBlocks = 64;  // of a slice
static_assert(kTokens * kBlocks == kSliceTokens);

// One row's part of the workspace. What a kernel reads there, one before it has written, or blocks
// of its own that drew earlier tickets; indices are clamped all the same.
struct RowScratch {
    unsigned long long* keys;     // [slices, K] the best of each slice, 0 where there are fewer
    unsigned long long* masses;   // [slices]
    unsigned long long* weights;  // [kDistances] of a row that samples
    uint32_t* block_max;          // [slices, kBlocks] ordered bits; NaN above all
    uint32_t* slice_max;          // [slices] the same
    float* cut;       // what the filter keeps: above it, and of its equals the ids up to
    int32_t* cut_id;  // this one
    unsigned *rank_ticket, *filter_ticket;
};

__device__ __forceinline__ int num_slices(const TreeExpandParams& p) {
    return static_cast<int>(expand_slices(p.rows));
}

__device__ __forceinline__ RowScratch row_scratch(const TreeExpandParams& p, int row) {
    const int64_t slices = num_slices(p);
    auto* words = reinterpret_cast<uint32_t*>(p.workspace);
    RowScratch s;
    s.keys = reinterpret_cast<unsigned long long*>(words + int64_t{row} *
                                                               expand_row_words(p.rows, p.top_k));
    s.masses = s.keys + slices * p.top_k;
    s.weights = s.masses + slices;
    s.block_max = reinterpret_cast<uint32_t*>(s.weights + kDistances);
    s.slice_max = s.block_max + slices * kBlocks;
    s.cut = reinterpret_cast<float*>(s.slice_max + slices);
    s.cut_id = reinterpret_cast<int32_t*>(s.cut + 1);
    s.rank_ticket = words + p.workspace_size - 1 - row;
    s.filter_ticket = s.rank_ticket - int64_t{p.batch} * p.top_k;
    return s;
}

__device__ __forceinline__ unsigned* sequence_ticket(const TreeExpandParams& p, int64_t seq) {
    auto* words = reinterpret_cast<uint32_t*>(p.workspace);
    return words + p.workspace_size - 1 - 2 * int64_t{p.batch} * p.top_k - seq;
}

struct DraftRow {
    const float* logits;
    const SamplingRow* sampling;  // nullptr: ranked plainly
    float temperature;
    uint32_t rows;

    __device__ __forceinline__ DraftRow(const TreeExpandParams& p, int row)
        : logits(p.logits + int64_t{row / p.width} * p.logits_stride[0] +
                 int64_t{row % p.width} * p.logits_stride[1]),
          sampling(p.sampling ? p.sampling + row / p.width : nullptr),
          temperature(1.0f),
          rows(static_cast<uint32_t>(p.rows)) {
        if (sampling && !(sampling->temperature > 0.0f)) sampling = nullptr;
        if (sampling) temperature = sampling->temperature;
    }

    // -inf past the end.
    __device__ __forceinline__ float raw(uint32_t i) const {
        return i < rows ? logits[i] : -INFINITY;
    }
    // Of what raw(i) was. (What lies past the end stays -inf: infinite temperatures make it NaN.)
    __device__ __forceinline__ float processed(float logit, uint32_t i) const {
        return sampling && i < rows ? logit / temperature : logit;
    }
};

// Of a maximum that scan_slices left: NaN or +inf somewhere, or nothing but -inf.
__device__ __forceinline__ bool is_bad(uint32_t row_max) {
    return row_max >= kOrderedInf || row_max <= kOrderedMinusInf;
}

// A row's maximum; to all lanes.
__device__ __forceinline__ uint32_t row_max(const RowScratch& scratch, int slices) {
    uint32_t top = 0;
    for (int slice = threadIdx.x % 32; slice < slices; slice += 32)
        top = max(top, scratch.slice_max[slice]);
    return __reduce_max_sync(kFullWarp, top);
}

constexpr int kRowThreads = 256;  // of a block
constexpr int kKnown = kRowThreads;

struct KnownShared {
    uint32_t values[kKnown];
    uint32_t found;
};

// Ordered bits of a logit that `wanted` tokens of the row do not lie below, and that is above
// `cut`; 0 if none is known. The maxima of this slice's blocks and of the other slices are as many
// different tokens. All threads of the block must call.
__device__ __forceinline__ uint32_t known_best(const RowScratch& scratch, int slices, int slice,
                                               float cut, int wanted, KnownShared* shared) {
    const int i = static_cast<int>(threadIdx.x), other = i - kBlocks;
    const int count = kBlocks + slices < kKnown ? kBlocks + slices : kKnown;
    uint32_t mine = 0;
    if (i < kBlocks) mine = scratch.block_max[slice * kBlocks + i];
    if (i >= kBlocks && i < count && other != slice) mine = scratch.slice_max[other];
    if (mine <= ordered_bits(cut)) mine = 0;  // of those equal to it not all may be kept
    shared->values[i] = mine;
    if (i == 0) shared->found = 0;
    __syncthreads();
    int better = 0;
    if (i < count)
        for (int j = 0; j < count; ++j)
            better += shared->values[j] > mine || (shared->values[j] == mine && j < i);
    if (i < count && better == wanted - 1) shared->found = mine;
    __syncthreads();
    return shared->found;
}

// The tokens of a thread, in four rounds of four: first_token, and 16, 32 and 48 further, as many
// as a counter has noise for.
__device__ __forceinline__ uint32_t first_token(int slice, int round) {
    const uint32_t block = slice * kBlocks + kRowThreads / 16 * round + threadIdx.x / 16;
    return block * kTokens + threadIdx.x % 16;
}

// What of each row that samples is kept, into its scratch; between scan_slices and rank_slices.
void filter_rows(const TreeExpandParams& p, CudaStream stream);

}  // namespace specrt
