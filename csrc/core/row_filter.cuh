// top_k (ties kept), top_p over what it left, then min_p, as core/sampling_filter.h has them: the
// kept set of one row of logits, found by a block of threads.
//
// Both are one question: going from the best down, at which logit do the weights so far reach a
// target? top_k weighs each token 1, top_p by its mass. Four passes over the tokens answer it, a
// byte of the ordered logit each: weights by the byte's value, of the tokens that agree with what
// is known already. They are integers, so the order of their sums cannot show.
#pragma once
#include "core/mass.h"
#include "core/reduce.cuh"
#include "core/sampling_row.h"
#include "core/score_key.h"

namespace specrt {

struct SelectShared {
    unsigned long long weights[256];
    unsigned long long before, sum;
    uint32_t digit;
};

// Adds each lane's weight (at most 2^40) to its digit's: one atomic for each digit a warp has, for
// neighbours in a row mostly share theirs. All lanes must call.
__device__ __forceinline__ void add_weight(unsigned long long* weights, bool is_in, uint32_t digit,
                                           uint64_t weight) {
    const unsigned lane = threadIdx.x % 32;
    unsigned todo = __ballot_sync(kFullWarp, is_in);
    while (todo != 0) {
        const int leader = __ffs(static_cast<int>(todo)) - 1;
        const uint32_t led = __shfl_sync(kFullWarp, digit, leader);
        const bool is_same = is_in && digit == led;
        const unsigned low = is_same ? static_cast<unsigned>(weight & 0xfffffu) : 0u;
        const unsigned high = is_same ? static_cast<unsigned>(weight >> 20) : 0u;
        const uint64_t sum = (uint64_t{__reduce_add_sync(kFullWarp, high)} << 20) +
                             __reduce_add_sync(kFullWarp, low);
        if (lane == static_cast<unsigned>(leader))
            atomicAdd(weights + digit, static_cast<unsigned long long>(sum));
        todo &= ~__ballot_sync(kFullWarp, is_same);
    }
}

// The digit at which the weights, largest digit first, reach `target`. One warp calls.
__device__ __forceinline__ void find_digit(SelectShared* shared, uint64_t target) {
    const int lane = threadIdx.x % 32, first = 8 * lane;
    uint64_t own = 0;
    for (int digit = first; digit < first + 8; ++digit) own += shared->weights[digit];
    uint64_t above = own;
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t further = __shfl_down_sync(kFullWarp, above, step);
        if (lane + step < 32) above += further;
    }
    above -= own;
    if (lane == 0) shared->digit = 0;
    __syncwarp();
    for (int digit = first + 7; digit >= first; --digit) {
        const uint64_t weight = shared->weights[digit];
        if (above < target && target <= above + weight) {
            shared->digit = static_cast<uint32_t>(digit);
            shared->before = above;
        }
        above += weight;
    }
}

struct Selected {
    uint32_t value;
    uint64_t before;  // the weight of all larger values
};

// The value at which the weights of values, largest first, reach `target`, 1 to their sum.
// each(add) calls add(is_in, value, weight) for all, every time in all lanes of a warp. All threads
// of the block must call, at least 32.
template <typename Each>
__device__ __forceinline__ Selected select_by_weight(SelectShared* shared, uint64_t target,
                                                     const Each& each) {
    Selected found{0, 0};
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int digit = threadIdx.x; digit < 256; digit += blockDim.x) shared->weights[digit] = 0;
        if (threadIdx.x == 0) shared->before = 0;
        __syncthreads();
        each([&](bool is_in, uint32_t value, uint64_t weight) {
            const bool agrees = (uint64_t{value ^ found.value} >> (shift + 8)) == 0;
            add_weight(shared->weights, is_in && agrees, value >> shift & 255u, weight);
        });
        __syncthreads();
        if (threadIdx.x < 32) find_digit(shared, target - found.before);
        __syncthreads();
        found.value |= shared->digit << shift;
        found.before += shared->before;
        __syncthreads();
    }
    return found;
}

// The sum of all threads' masses, to all. All threads of the block must call.
__device__ __forceinline__ uint64_t block_mass(uint64_t mass, unsigned long long* sum) {
    __syncthreads();  // the sum before may still be read
    if (threadIdx.x == 0) *sum = 0;
    __syncthreads();
    for (int step = 16; step > 0; step /= 2) mass += __shfl_xor_sync(kFullWarp, mass, step);
    if (threadIdx.x % 32 == 0) atomicAdd(sum, static_cast<unsigned long long>(mass));
    __syncthreads();
    return *sum;
}

// The kept set: tokens above `cut`, and of those equal to it the ids up to `cut_id`.
struct RowFilter {
    float cut;
    int32_t cut_id;

    __device__ __forceinline__ bool keeps(float value, int64_t id) const {
        return value > cut || (value == cut && id <= cut_id);
    }
};

struct FilterRules {
    double top_p;
    float min_p;
    int32_t top_k;
    bool has_top_k, has_top_p;

    __device__ __forceinline__ FilterRules(const SamplingRow& row, int32_t vocab)
        : top_p(row.top_p < 0.0 ? 0.0 : row.top_p),
          min_p(row.min_p),
          top_k(row.top_k),
          has_top_k(row.top_k > 0 && row.top_k < vocab),
          has_top_p(row.top_p < 1.0) {}
};

__device__ __forceinline__ RowFilter with_min_p(RowFilter filter, float top, float min_p) {
    if (!(min_p > 0.0f)) return filter;
    const float cut = top + log_of(min_p < 1.2e-38f ? 1.2e-38f : min_p);
    return cut > filter.cut ? RowFilter{cut, INT32_MAX} : filter;
}

// tokens(see): see(key), a token's core/score_key.h or 0, for all that may be kept, every time in
// all lanes of a warp. total: the row's mass; not read where top_k is on.
template <typename Tokens>
__device__ __forceinline__ RowFilter make_filter(const FilterRules& rules, const Tokens& tokens,
                                                 float top, uint64_t total, SelectShared* shared) {
    uint32_t cut = 0;
    const auto mass_above_cut = [&](uint64_t key) {
        return key >> 32 >= cut && key != 0 ? mass_of(score_of(key) - top) : 0;
    };
    if (rules.has_top_k) {
        const auto count = [&](auto add) {
            tokens([&](uint64_t key) { add(key != 0, static_cast<uint32_t>(key >> 32), 1); });
        };
        cut = select_by_weight(shared, rules.top_k, count).value;
    }
    RowFilter filter{cut > 0 ? from_ordered_bits(cut) : -INFINITY, INT32_MAX};
    if (rules.has_top_p) {
        if (rules.has_top_k) {
            uint64_t kept = 0;
            tokens([&](uint64_t key) { kept += mass_above_cut(key); });
            total = block_mass(kept, &shared->sum);
        }
        const uint64_t target = nucleus_mass(rules.top_p, total);
        const Selected last = select_by_weight(shared, target, [&](auto add) {
            tokens([&](uint64_t key) {
                const uint64_t mass = mass_above_cut(key);
                add(mass > 0, static_cast<uint32_t>(key >> 32), mass);
            });
        });
        // Of equal logits as many as it takes, smallest ids first; a key holds the id's complement.
        const Selected id = select_by_weight(shared, target - last.before, [&](auto add) {
            tokens([&](uint64_t key) {
                const bool is_equal = key >> 32 == last.value;
                add(is_equal, static_cast<uint32_t>(key), is_equal ? mass_above_cut(key) : 0);
            });
        });
        filter = {from_ordered_bits(last.value), index_of(id.value)};
    }
    return with_min_p(filter, top, rules.min_p);
}

}  // namespace specrt
