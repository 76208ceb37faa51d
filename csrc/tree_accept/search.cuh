// What a block looks for in a row: the largest value, the best score with noise, sums, the place
// where a running sum passes a target. Whole numbers and maxima: the order of threads cannot show.
#pragma once
#include "tree_accept/row.cuh"

namespace specrt {

constexpr int kAcceptWarps = kAcceptThreads / 32;

// 32 bits at a time: a warp's reduction is one instruction.
__device__ __forceinline__ uint64_t warp_largest(uint64_t x) {
    const uint32_t mine = static_cast<uint32_t>(x >> 32), low = static_cast<uint32_t>(x);
    const uint32_t high = __reduce_max_sync(kFullWarp, mine);
    const uint32_t rest = __reduce_max_sync(kFullWarp, mine == high ? low : 0u);
    return static_cast<uint64_t>(high) << 32 | rest;
}

// 27 bits at a time, of which 32 lanes' sum has 32.
__device__ __forceinline__ uint64_t warp_total(uint64_t x) {
    constexpr uint32_t kPart = (1u << 27) - 1;
    uint64_t sum = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(x) & kPart);
    sum +=
        static_cast<uint64_t>(__reduce_add_sync(kFullWarp, static_cast<uint32_t>(x >> 27) & kPart))
        << 27;
    return sum +
           (static_cast<uint64_t>(__reduce_add_sync(kFullWarp, static_cast<uint32_t>(x >> 54)))
            << 54);
}

// The block's largest, or sum, to all threads. `words` has one for each warp, and may be used again
// after the next __syncthreads(). All threads of the block must call.
__device__ __forceinline__ uint64_t block_largest(uint64_t x, uint64_t* words) {
    x = warp_largest(x);
    if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_largest(words[threadIdx.x % kAcceptWarps]);
}

__device__ __forceinline__ uint64_t block_total(uint64_t x, uint64_t* words) {
    x = warp_total(x);
    if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_total(threadIdx.x % 32 < kAcceptWarps ? words[threadIdx.x % 32] : 0);
}

// The sum over all threads before this one.
__device__ __forceinline__ uint64_t block_sum_before(uint64_t x, uint64_t* words) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t sum = x;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(kFullWarp, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) words[warp] = sum;
    __syncthreads();
    for (unsigned w = 0; w < warp; ++w) sum += words[w];
    return sum - x;
}

// Where a running sum of weights, kEach a thread, first comes to a target of at least 1.
struct Place {
    int at;           // -1: nowhere
    uint64_t before;  // the sum of what comes before
};

struct PlaceRoom {
    uint64_t words[kAcceptWarps];
    Place place;
};

template <int kEach>
__device__ __forceinline__ Place find_place(const uint64_t (&weights)[kEach], uint64_t target,
                                            PlaceRoom* room) {
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += weights[i];
    __syncthreads();  // the place before may still be read
    if (threadIdx.x == 0) room->place = {-1, 0};
    uint64_t before = block_sum_before(sum, room->words);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if (before < target && target - before <= weights[i])
            room->place = {static_cast<int>(threadIdx.x) * kEach + i, before};
        before += weights[i];
    }
    __syncthreads();
    return room->place;
}

// --- random bits
// Not by number: an array with an index lies in memory.
__device__ __forceinline__ uint32_t word_of(const PhiloxWords& bits, uint32_t number) {
    const uint32_t low = number % 2 == 0 ? bits.word[0] : bits.word[1];
    const uint32_t high = number % 2 == 0 ? bits.word[2] : bits.word[3];
    return number < 2 ? low : high;
}

__device__ __forceinline__ uint32_t bits_at(uint64_t seed, uint64_t position, Purpose purpose,
                                            uint32_t index) {
    return word_of(bits_around(seed, position, purpose, index), index / 16u % 4u);
}

// --- largest value
// A thread meets its tokens in the order of their ids, so of equals the first one stays.
struct MaxSearch {
    float best = -kInf;
    int32_t token = 0;
    bool is_bad = false;

    __device__ void visit(const Tile& tile) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float x = tile.x[r][i];
                is_bad = is_bad || !(x < kInf);
                if (!(x > best)) continue;
                best = x;
                token = tile.id(r, i);
            }
    }
};

// --- best score with noise
// In shared memory. All threads share the best score yet, and what cannot come near it is passed
// over: float addition is monotone, so a value below `best` under an upper bound of its noise is
// below it under the noise itself. Whatever a thread sees of `best`, the winner is the same.
struct NoiseSearch {
    uint64_t seed, position;
    uint64_t best;  // 0 as long as there is none

    __device__ uint64_t best_yet() const { return *const_cast<const volatile uint64_t*>(&best); }
    __device__ float bound() const { return score_of(best_yet()); }  // NaN: nothing is below it
    __device__ void offer(float score, int32_t token) {
        const uint64_t key = key_of(score, token);
        if (key > best_yet())
            atomicMax(reinterpret_cast<unsigned long long*>(&best),
                      static_cast<unsigned long long>(key));
    }
    __device__ void visit_one(float x, int32_t token) {
        if (x == -kInf || x + kMaxGumbel < bound()) return;
        const uint32_t index = static_cast<uint32_t>(token);
        offer(x + gumbel_from(bits_at(seed, position, Purpose::kTarget, index)), token);
    }
    // Of one counter.
    __device__ void visit_four(const Tile& tile, int i) {
        const float top =
            fmaxf(fmaxf(tile.x[0][i], tile.x[1][i]), fmaxf(tile.x[2][i], tile.x[3][i]));
        const float least = bound();
        if (top == -kInf || top + kMaxGumbel < least) return;
        const PhiloxWords bits =
            bits_around(seed, position, Purpose::kTarget, static_cast<uint32_t>(tile.id(0, i)));
        const uint32_t lowest =
            min(min(bits.word[0], bits.word[1]), min(bits.word[2], bits.word[3]));
        const float most = gumbel_bound(lowest);
        if (top + most < least) return;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float x = tile.x[r][i];
            if (x == -kInf || x + most < least) continue;
            offer(x + gumbel_from(bits.word[r]), tile.id(r, i));
        }
    }
    __device__ void visit(const Tile& tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) visit_four(tile, i);
    }
};

}  // namespace specrt
