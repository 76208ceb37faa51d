// silu(x) = x / (1 + e^-x).
#pragma once
#include "core/launch.cuh"

namespace specrt {

// expf (2 ulp) and the IEEE division rather than __expf, whose relative error grows with |x|: some
// 30 instructions an element, and the memory gives an SM no more than three elements a cycle.
__device__ __forceinline__ float silu(float x) {
    return x / (1.0f + expf(-x));
}

}  // namespace specrt
