// Which tokens of a row that samples are kept, before their noise is looked at.
//
// Few of a row's tokens can be kept mostly, and which ones is seen without the others: those that
// top_k tokens are known to exceed cannot, nor those so light that all of their kind weigh less
// than top_p leaves out, the row's mass being that of its best token at least. All slices put those
// that can into one list (in any order: what follows adds integers), and whoever comes last of the
// row filters the list; or the row itself, where the list has no room for them.
#include "core/row_filter.cuh"
#include "tree_build/draft_row.cuh"

namespace specrt {
namespace {

struct FilterShared {
    unsigned long long listed[kMostListed];
    SelectShared select;
    KnownShared known;
    int flag;
};

// Which tokens may be kept.
struct Possible {
    bool is_by_mass;
    float top, least;  // by mass: logit - top
    uint32_t ordered;  // else: the logit

    __device__ __forceinline__ bool has(float x) const {
        return is_by_mass ? x - top >= least : ordered_bits(x) >= ordered;
    }
};

// To the end of the row's list, as far as there is room. All lanes must call.
__device__ __forceinline__ void list_token(const RowScratch& scratch, bool is_listed,
                                           uint64_t key) {
    const unsigned lane = threadIdx.x % 32, listed = __ballot_sync(kFullWarp, is_listed);
    if (listed == 0) return;
    unsigned first = 0;
    if (lane == 0) first = atomicAdd(scratch.num_listed, static_cast<unsigned>(__popc(listed)));
    const int64_t at =
        int64_t{__shfl_sync(kFullWarp, first, 0)} + __popc(listed & ((1u << lane) - 1));
    if (is_listed && at < kMostListed) scratch.listed[at] = key;
}

// Lists the slice's tokens, and gives this thread's part of its mass.
__device__ __forceinline__ uint64_t list_slice(const DraftRow& row, const RowScratch& scratch,
                                               int slice, const Possible& possible) {
    uint64_t mass = 0;
    for (int round = 0; round < 4; ++round) {
        const int64_t first = first_token(slice, round);
        float x[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) x[r] = row.raw(first + 16 * r);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int64_t token = first + 16 * r;
            x[r] = row.processed(x[r], token);
            list_token(scratch, token < row.rows && possible.has(x[r]),
                       key_of(x[r], static_cast<int32_t>(token)));
            if (possible.is_by_mass) mass += mass_of(x[r] - possible.top);
        }
    }
    return mass;
}

__device__ __forceinline__ RowFilter filter_row(const FilterRules& rules, const DraftRow& row,
                                                const RowScratch& scratch, int slices, float top,
                                                FilterShared* shared) {
    uint64_t mass = 0;
    for (int slice = threadIdx.x; slice < slices; slice += kRowThreads)
        mass += scratch.masses[slice];
    mass = block_mass(mass, &shared->select.sum);
    const int64_t listed = *scratch.num_listed;
    if (listed > kMostListed) {
        const auto all = [&](auto see) {
            const int64_t end = row.rows + 31;  // whole warps
            for (int64_t i = threadIdx.x; i / 32 < end / 32; i += kRowThreads)
                see(i < row.rows ? key_of(row.processed(row.raw(i), i), static_cast<int32_t>(i))
                                 : 0);
        };
        return make_filter(rules, all, top, mass, &shared->select);
    }
    for (int64_t i = threadIdx.x; i < listed; i += kRowThreads)
        shared->listed[i] = scratch.listed[i];
    __syncthreads();
    const auto all = [&](auto see) {
        for (int64_t i = threadIdx.x; i / 32 < (listed + 31) / 32; i += kRowThreads)
            see(i < listed ? uint64_t{shared->listed[i]} : 0);
    };
    return make_filter(rules, all, top, mass, &shared->select);
}

__global__ void __launch_bounds__(kRowThreads) filter_slices(const TreeExpandParams p) {
    auto* shared = reinterpret_cast<FilterShared*>(dynamic_shared());
    const int slices = num_slices(p), slice = static_cast<int>(blockIdx.x % slices);
    const RowScratch scratch = row_scratch(p, blockIdx.x / slices);
    const DraftRow row(p, blockIdx.x / slices);
    const uint32_t most = row_max(scratch, slices);
    if (!row.sampling || is_bad(most)) return;
    const float top = from_ordered_bits(most);
    const FilterRules rules(*row.sampling, p.rows);
    RowFilter filter{-INFINITY, INT32_MAX};
    if (!rules.has_top_k && !rules.has_top_p) {
        if (slice > 0 || threadIdx.x > 0) return;
        filter = with_min_p(filter, top, rules.min_p);
    } else {
        Possible possible{!rules.has_top_k, top, 0.0f, 0};
        if (rules.has_top_k)
            possible.ordered =
                known_best(scratch, slices, slice, -INFINITY, rules.top_k, &shared->known);
        else
            possible.least = logit_of_mass(light_mass(rules.top_p, mass_of(0.0f), p.rows));
        uint64_t mass = list_slice(row, scratch, slice, possible);
        mass = block_mass(mass, &shared->select.sum);
        if (threadIdx.x == 0) scratch.masses[slice] = mass;
        if (!is_last_block(scratch.filter_ticket, slices, &shared->flag)) return;
        filter = filter_row(rules, row, scratch, slices, top, shared);
    }
    if (threadIdx.x > 0) return;
    *scratch.cut = filter.cut;
    *scratch.cut_id = filter.cut_id;
}

}  // namespace

void filter_rows(const TreeExpandParams& p, CudaStream stream) {
    const int64_t blocks = int64_t{p.batch} * p.width * expand_slices(p.rows);
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kRowThreads),
                            sizeof(FilterShared)};
    SPECRT_LAUNCH(filter_slices, shape, stream, p);
}

}  // namespace specrt
