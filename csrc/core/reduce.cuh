// Sums over a warp and a block, in an order that depends on the block's size alone; votes; tickets.
#pragma once
#include "core/launch.cuh"

namespace specrt {

constexpr unsigned kFullWarp = 0xffffffffu;

// Every lane gets the same bits: partners add the same two numbers, and addition commutes.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
}

// The sum of all threads' x, to all threads; `scratch` has a float for each of at most 32 warps,
// and may be used again after the next __syncthreads().
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    x = warp_sum(x);
    if (num_warps == 1) return x;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < num_warps ? scratch[lane] : 0.0f);
}

// How many of the threads before this one say yes, and of the block altogether. `words` has one for
// each warp, and may be used again after the next __syncthreads().
struct Votes {
    int before, total;
};
__device__ __forceinline__ Votes block_votes(bool is_yes, unsigned* words) {
    const unsigned lane = threadIdx.x % 32, mine = __ballot_sync(kFullWarp, is_yes);
    if (lane == 0) words[threadIdx.x / 32] = mine;
    __syncthreads();
    Votes votes{__popc(mine & ((1u << lane) - 1)), 0};
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
        if (warp < threadIdx.x / 32) votes.before += __popc(words[warp]);
        votes.total += __popc(words[warp]);
    }
    return votes;
}

// A ticket's thread speaks for its block: the barrier before brings it all that the block wrote,
// its fence passes that on to who draws a later ticket, and its second fence (which empties the
// SM's L1) with the barrier after let the whole block read what came with earlier ones. Cooperative
// groups' grid.sync() is made like this.

// True in all threads of the block that comes last of `expected`, and only after everything that
// the others wrote before they came can be read. Sets the ticket back to 0 for the next launch.
// All threads of the block must call; `flag` is one shared int.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned expected, int* flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *flag = atomicAdd(ticket, 1u) + 1 == expected;
        if (*flag) *ticket = 0;
        __threadfence();
    }
    __syncthreads();
    return *flag != 0;
}

// For blocks that share a ticket as above: true in all threads if all others of `expected` have
// come, and then what they wrote can be read and the ticket is 0 again. Spares the last one its own
// writes.
__device__ __forceinline__ bool have_others_come(unsigned* ticket, unsigned expected, int* flag) {
    __syncthreads();  // the flag may still be read from before
    if (threadIdx.x == 0) {
        *flag = atomicAdd(ticket, 0u) + 1 == expected;
        if (*flag) {
            *ticket = 0;
            __threadfence();
        }
    }
    __syncthreads();
    return *flag != 0;
}

}  // namespace specrt
