// Which tokens of a row that samples are kept, before their noise is looked at.
//
// All slices of a row add up its tokens' weights (1 for top_k, else masses) by how far they lie
// below the best: 256 distances, an eighth of a logit each. Whoever comes last sees at which of
// them the cut is, and lists the tokens down to there, of blocks whose maximum reaches it. They are
// few, mostly, and what is kept is found among them; where the list has no room, as in flat rows,
// the whole row is gone through instead.
#include "core/ptx.cuh"
#include "core/row_filter.cuh"
#include "tree_build/draft_row.cuh"

namespace specrt {
namespace {

constexpr int kMostListed = 4096;
static_assert(kRowThreads == kDistances && kDistances == 256);  // a thread a distance

struct FilterShared {
    uint64_t listed[kMostListed];
    SelectShared select;
    int num_listed, flag;
};

// By distance from the best, which has the largest digit. (As subtraction is monotone, of two
// tokens with different digits the larger has the larger.)
__device__ __forceinline__ uint32_t digit_of(float x, float top) {
    const float distance = (top - x) * 8.0f;
    return distance < kDistances - 1 ? kDistances - 1 - static_cast<uint32_t>(distance) : 0;
}

// Adds the slice's weights to the row's. All threads of the block must call.
__device__ __forceinline__ void weigh_slice(const FilterRules& rules, const DraftRow& row,
                                            const RowScratch& scratch, int slice, float top,
                                            SelectShared* shared) {
    shared->weights[threadIdx.x] = 0;
    __syncthreads();
    for (int round = 0; round < 4; ++round) {
        const uint32_t first = first_token(slice, round);
        float x[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) x[r] = row.raw(first + 16 * r);
#pragma unroll
        for (int r = 0; r < 4; ++r) x[r] = row.processed(x[r], first + 16 * r);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const uint32_t token = first + 16 * r;
            const uint64_t weight = rules.has_top_k ? 1 : mass_of(x[r] - top);
            add_weight(shared->weights, token < row.rows && weight > 0, digit_of(x[r], top),
                       weight);
        }
    }
    __syncthreads();
    const unsigned long long weight = shared->weights[threadIdx.x];
    if (weight > 0) atomicAdd(scratch.weights + threadIdx.x, weight);
}

// Lists the tokens of at least `digit`, as far as there is room. All threads of the block must
// call.
__device__ __forceinline__ void list_tokens(const DraftRow& row, const RowScratch& scratch,
                                            int blocks, float top, uint32_t digit,
                                            FilterShared* shared) {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) shared->num_listed = 0;
    __syncthreads();
    for (int base = threadIdx.x - lane; base < blocks; base += kRowThreads) {
        const float block_max = from_ordered_bits(scratch.block_max[base + lane]);
        unsigned todo = __ballot_sync(kFullWarp, digit_of(block_max, top) >= digit);
        for (; todo != 0; todo &= todo - 1) {
            const uint32_t block = base + __ffs(static_cast<int>(todo)) - 1;
            for (uint32_t i = block * kTokens + lane; i < (block + 1) * kTokens; i += 32) {
                const float x = row.processed(row.raw(i), i);
                const bool is_listed = i < row.rows && digit_of(x, top) >= digit;
                const int at = is_listed ? atomicAdd(&shared->num_listed, 1) : kMostListed;
                if (at < kMostListed) shared->listed[at] = key_of(x, static_cast<int32_t>(i));
            }
        }
    }
    __syncthreads();
}

// After all slices have been weighed. All threads of the block must call.
__device__ __forceinline__ RowFilter filter_row(const FilterRules& rules, const DraftRow& row,
                                                const RowScratch& scratch, int blocks, float top,
                                                FilterShared* shared) {
    const uint64_t weight = scratch.weights[threadIdx.x];
    shared->select.weights[threadIdx.x] = weight;
    const uint64_t total = block_mass(weight, &shared->select.sum);
    const uint64_t target = rules.has_top_k ? rules.top_k : nucleus_mass(rules.top_p, total);
    if (threadIdx.x < 32) find_digit(&shared->select, target);
    __syncthreads();
    list_tokens(row, scratch, blocks, top, shared->select.digit, shared);
    const int listed = shared->num_listed;
    const bool is_listed = listed <= kMostListed;
    const uint32_t count = is_listed ? listed : row.rows, whole_warps = (count + 31) / 32 * 32;
    const auto tokens = [&](auto see) {
        for (uint32_t i = threadIdx.x; i < whole_warps; i += kRowThreads) {
            uint64_t key = 0;  // past the end: lanes stay together
            if (i < count)
                key = is_listed ? shared->listed[i]
                                : key_of(row.processed(row.raw(i), i), static_cast<int32_t>(i));
            see(key);
        }
    };
    return make_filter(rules, tokens, top, total, &shared->select);
}

// Three blocks an SM are enough; for more, ptxas would spill registers.
__global__ void __launch_bounds__(kRowThreads, 3) filter_slices(const TreeExpandParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    auto* shared = reinterpret_cast<FilterShared*>(dynamic_shared());
    const int slices = num_slices(p), slice = static_cast<int>(blockIdx.x % slices);
    const int number = static_cast<int>(blockIdx.x / slices);
    if (is_closed(p, number / p.width)) return;
    const RowScratch scratch = row_scratch(p, number);
    const DraftRow row(p, number);
    const uint32_t most = row_max(scratch, slices);
    if (!row.sampling || is_bad(most)) return;
    const float top = from_ordered_bits(most);
    const FilterRules rules(*row.sampling, p.rows);
    RowFilter filter{-INFINITY, INT32_MAX};
    if (rules.has_top_k || rules.has_top_p) {
        weigh_slice(rules, row, scratch, slice, top, &shared->select);
        if (!is_last_block(scratch.filter_ticket, slices, &shared->flag)) return;
        filter = filter_row(rules, row, scratch, slices * kBlocks, top, shared);
    } else {
        filter = with_min_p(filter, top, rules.min_p);  // the same in all slices
    }
    if (threadIdx.x > 0) return;
    *scratch.cut = filter.cut;
    *scratch.cut_id = filter.cut_id;
}

}  // namespace

void filter_rows(const TreeExpandParams& p, CudaStream stream) {
    const int64_t blocks = int64_t{p.batch} * p.width * expand_slices(p.rows);
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kRowThreads),
                            sizeof(FilterShared), kOverlaps};
    SPECRT_LAUNCH(filter_slices, shape, stream, p);
}

}  // namespace specrt
