// The best keys (core/score_key.h) of any number, found by a block of threads.
//
// Keys that may be among the best go to shared memory, in whatever order threads come; where it
// gets full, it is sorted, and what is past the best is forgotten. As no two keys are equal, what
// is left does not depend on that order.
#pragma once
#include "core/reduce.cuh"
#include "core/score_key.h"

namespace specrt {

constexpr int kMostBest = 128;   // the most that may be asked for
constexpr int kKeyRound = 1024;  // keys a block offers before it looks whether there is room
constexpr int kKeyRoom = 2 * kKeyRound;

struct BestKeys {
    uint64_t keys[kKeyRoom];  // the first `count`, best first once sorted; 0 is no key
    int count;
};

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
    int size = 64;
    while (size < count) size *= 2;
    for (int i = count + threadIdx.x; i < size; i += blockDim.x) best->keys[i] = 0;
    __syncthreads();
    sort_keys(best->keys, size);
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

// The best `most` of key(0) ... key(total - 1), sorted. All threads of the block must call.
template <typename Key>
__device__ __forceinline__ void find_best(BestKeys* best, int64_t total, int most, Key key) {
    uint64_t bound = 0;
    clear_keys(best);
    for (int64_t start = 0; start < total; start += kKeyRound) {
        make_room(best, most, &bound);
        for (int i = threadIdx.x; i < kKeyRound; i += blockDim.x)
            if (start + i < total) offer_key(best, key(start + i), bound);
    }
    __syncthreads();
    keep_best(best, most);
}

}  // namespace specrt
