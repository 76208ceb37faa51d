// The best keys (core/score_key.h) of any number, found by a block of threads.
//
// Keys that may be among the best go to shared memory, in whatever order threads come; where it
// gets full, it is sorted, and what is past the best is forgotten. As no two keys are equal, what
// is left does not depend on that order. Blocks have 128, 256 or 512 threads.
#pragma once
#include "core/reduce.cuh"
#include "core/score_key.h"

namespace specrt {

constexpr int kMostBest = 128;   // the most that may be asked for
constexpr int kKeyRound = 1024;  // keys a block offers before it looks whether there is room
constexpr int kKeyRoom = 2 * kKeyRound;
constexpr int kMostCounted = 128;  // keys that are counted, not sorted: a few steps instead of 28

struct BestKeys {
    uint64_t keys[kKeyRoom];  // the first `count`, best first once sorted; 0 is no key
    uint64_t known;           // while keys are found
    int count;
};

// How many of `count` keys come before key i, counted by the blockDim.x / most_keys neighbouring
// threads that have the same i; to all of them.
__device__ __forceinline__ int num_before(const uint64_t* keys, int count, int i, int most_keys) {
    const int sharing = static_cast<int>(blockDim.x) / most_keys;
    const uint64_t mine = keys[i];
    int before = 0;
#pragma unroll 4
    for (int j = static_cast<int>(threadIdx.x) % sharing; j < count; j += sharing)
        before += keys[j] > mine || (keys[j] == mine && j < i);
    for (int step = 1; step < sharing; step *= 2)
        before += __shfl_xor_sync(kFullWarp, before, step);
    return before;
}

// Largest first, of at most kMostCounted keys. All threads of the block must call, after a barrier;
// the keys are in order after the next one.
__device__ __forceinline__ void place_keys(uint64_t* keys, int count) {
    const int sharing = static_cast<int>(blockDim.x) / kMostCounted;
    const int i = static_cast<int>(threadIdx.x) / sharing;
    const int place = num_before(keys, count, i, kMostCounted);
    const uint64_t mine = keys[i];
    __syncthreads();
    if (i < count && static_cast<int>(threadIdx.x) % sharing == 0) keys[place] = mine;
}

__device__ __forceinline__ uint64_t sorted_with(uint64_t mine, int step, bool is_descending) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, mine, step);
    const bool is_first = (threadIdx.x & static_cast<unsigned>(step)) == 0;
    return (is_first == is_descending) == (other > mine) ? other : mine;
}

// Those steps of a bitonic sort that reach no further than 32, for runs of two sizes and what is
// between: a warp has 64 keys at a time in registers, two a lane.
__device__ __forceinline__ void sort_in_warps(uint64_t* keys, int size, int first_run,
                                              int last_run) {
    const int lane = threadIdx.x % 32;
    for (int base = threadIdx.x / 32 * 64; base < size; base += 2 * blockDim.x) {
        uint64_t low = keys[base + lane], high = keys[base + 32 + lane];
        for (int run = first_run; run <= last_run; run *= 2) {
            const bool is_down = ((base + lane) & run) == 0;
            if (run > 32 && (low < high) == is_down) {
                const uint64_t held = low;
                low = high;
                high = held;
            }
            const bool is_high_down = ((base + 32 + lane) & run) == 0;
            for (int step = run > 32 ? 16 : run / 2; step > 0; step /= 2) {
                low = sorted_with(low, step, is_down);
                high = sorted_with(high, step, is_high_down);
            }
        }
        keys[base + lane] = low;
        keys[base + 32 + lane] = high;
    }
}

// Largest first; size: 64 or a larger power of two. All threads of the block must call, after a
// barrier, and find it done.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int size) {
    sort_in_warps(keys, size, 2, 64);
    for (int run = 128; run <= size; run *= 2) {
        __syncthreads();
        for (int step = run / 2; step > 32; step /= 2) {
            for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
                const int i = 2 * pair - (pair & (step - 1));
                const uint64_t a = keys[i], b = keys[i + step];
                if ((a < b) != ((i & run) == 0)) continue;
                keys[i] = b;
                keys[i + step] = a;
            }
            __syncthreads();
        }
        sort_in_warps(keys, size, run, run);
    }
    __syncthreads();
}

// Keeps the best `most` of what is held, sorted. Gives the key that further ones must exceed. All
// threads of the block must call, after a barrier.
__device__ __forceinline__ uint64_t keep_best(BestKeys* best, int most) {
    const int count = best->count;
    if (count <= kMostCounted) {
        place_keys(best->keys, count);
    } else {
        int size = 2 * kMostCounted;
        while (size < count) size *= 2;
        for (int i = count + threadIdx.x; i < size; i += blockDim.x) best->keys[i] = 0;
        __syncthreads();
        sort_keys(best->keys, size);
    }
    if (threadIdx.x == 0) best->count = count < most ? count : most;
    __syncthreads();
    return count > 0 && count >= most ? best->keys[most - 1] : 0;
}

// Before the first key is offered. All threads of the block must call.
__device__ __forceinline__ void clear_keys(BestKeys* best) {
    __syncthreads();  // the keys before may still be read
    if (threadIdx.x == 0) best->count = 0;
    __syncthreads();
}

// Room for another kKeyRound keys. All threads of the block must call. (Who offered last sees all
// that were offered, so that the vote is on the true count.)
__device__ __forceinline__ void make_room(BestKeys* best, int most, uint64_t* bound) {
    if (__syncthreads_or(best->count + kKeyRound > kKeyRoom)) *bound = keep_best(best, most);
}

__device__ __forceinline__ void offer_key(BestKeys* best, uint64_t key, uint64_t bound) {
    if (key > bound) best->keys[atomicAdd(&best->count, 1)] = key;
}

// A key below which `most` of key(0) ... key(total - 1) do not lie, or 0: the most-th of what is
// the best to groups of threads. All threads of the block must call, and find it after a barrier.
template <typename Key>
__device__ __forceinline__ void know_key(BestKeys* best, int64_t total, int most, const Key& key) {
    const int groups = most <= 24 ? 32 : kMostCounted;  // some more than are asked for
    const int sharing = static_cast<int>(blockDim.x) / groups;
    uint64_t mine = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < total; i += blockDim.x) {
        const uint64_t other = key(i);
        mine = other > mine ? other : mine;
    }
    for (int step = 1; step < sharing; step *= 2) {
        const uint64_t other = __shfl_xor_sync(kFullWarp, mine, step);
        mine = other > mine ? other : mine;
    }
    const int group = static_cast<int>(threadIdx.x) / sharing;
    if (static_cast<int>(threadIdx.x) % sharing == 0) best->keys[group] = mine;
    __syncthreads();
    if (num_before(best->keys, groups, group, groups) == most - 1) best->known = mine;
}

// The best `most` of those of key(0) ... key(total - 1) that exceed `bound`, sorted. All threads of
// the block must call.
template <typename Key>
__device__ __forceinline__ void find_best(BestKeys* best, int64_t total, int most, const Key& key,
                                          uint64_t bound = 0) {
    __syncthreads();  // the keys before may still be read
    if (threadIdx.x == 0) {
        best->count = 0;
        best->known = 0;
    }
    __syncthreads();
    if (total > kMostCounted) {
        know_key(best, total, most, key);
        __syncthreads();
        if (best->known > bound) bound = best->known - 1;
    }
    for (int64_t start = 0; start < total; start += kKeyRound) {
        make_room(best, most, &bound);
        for (int i = threadIdx.x; i < kKeyRound; i += 2 * blockDim.x) {  // two are on their way
            const int64_t one = start + i, other = one + blockDim.x;
            const uint64_t first = one < total ? key(one) : 0,
                           second = other < total ? key(other) : 0;
            offer_key(best, first, bound);
            offer_key(best, second, bound);
        }
    }
    __syncthreads();
    keep_best(best, most);
}

}  // namespace specrt
