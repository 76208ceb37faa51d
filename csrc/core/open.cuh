// Flags of core/open.h, read so that nothing waits for them until they are needed.
#pragma once
#include "core/open.h"
#include "core/reduce.cuh"

namespace specrt {

// A lane's share, on its way: 0 if all of these are closed.
__device__ __forceinline__ int32_t ask_flags(const Openness& o) {
    if (!o.is_open) return 1;
    const volatile int32_t* flags = o.is_open;
    const int32_t lane = threadIdx.x % 32;
    int32_t share = lane < o.batch ? flags[lane] : 0;
    for (int32_t b = lane + 32; b < o.batch; b += 32) share |= flags[b];
    return share;
}

// All lanes of the warp must call, with what they asked for.
__device__ __forceinline__ bool is_any_open(int32_t share) {
    return __any_sync(kFullWarp, share != 0);
}

}  // namespace specrt
